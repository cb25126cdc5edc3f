"""A whole worker on a small random checkpoint: same request, same bits, whatever goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families
from runtime_fakes import Planner, i32

from fakes.checkpoints import make_checkpoint
from quire.config import EngineConfig
from quire.errors import ConfigError, ModelError, ResourceError
from quire.link import QueueLink
from quire.sampling import SamplingParams
from quire.v1 import step_pb2 as pb
from quire_worker import daemon
from quire_worker.worker import Worker

GREEDY = SamplingParams(temperature=0, ignore_eos=True, logprobs=3)
RANDOM = SamplingParams(temperature=1, seed=42, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def config_for(folder, **fields):
    return EngineConfig(
        **{
            "model": str(folder), "device": "cpu", "max_num_seqs": 16, "max_model_len": 256,
            "num_gpu_blocks_override": 200, "served_model_name": ("tiny",), **fields,
        }
    )  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def worker(request, folder):
    worker = Worker(config_for(folder, dtype=request.param))
    yield worker
    worker.close()


def planner_for(worker) -> Planner:
    return Planner(worker.runner, epoch=worker.runner.gate.epoch + 1)


def prompt_of(n, seed=1):
    return np.random.default_rng(seed).integers(0, 500, n).tolist()


def outcome(planner, slot):
    return planner.outputs[slot], planner.logprobs[slot], planner.ranks[slot]


@pytest.mark.parametrize("params", [GREEDY, RANDOM])
def test_a_request_has_the_same_bits_alone_chunked_cached_and_in_a_batch(worker, params):
    prompt, n = prompt_of(45), 12
    alone = planner_for(worker)
    alone.generate(0, prompt, params, n=n, logprobs=True)
    expected = outcome(alone, 0)
    assert len(expected[0]) == n and all(len(entries) == 4 for entries in expected[1])

    chunked = planner_for(worker)
    chunked.generate(3, prompt, params, n=n, chunk=7, logprobs=True)
    assert outcome(chunked, 3) == expected

    cached = planner_for(worker)
    cached.generate(0, prompt, params, n=1)
    shared = cached.blocks[0][:2]
    cached.generate(1, prompt, params, n=n, computed=32, blocks=shared, logprobs=True)
    assert outcome(cached, 1) == expected

    resumed = planner_for(worker)
    resumed.generate(0, prompt, params, n=n - 5, output=expected[0][:5], logprobs=True)
    assert tuple(part[5:] for part in expected) == outcome(resumed, 0)

    batch = planner_for(worker)
    for slot in range(1, 16):
        other = SamplingParams(temperature=slot % 3 / 2, seed=slot, top_k=slot, ignore_eos=True)
        length = 3 * slot + 2
        admit = [batch.admit(slot, prompt_of(length, seed=slot), other)]
        rows = dict.fromkeys(range(1, slot), 1)
        batch.run({**rows, slot: length}, admit=admit)
    rows = dict.fromkeys(range(1, 16), 1)
    batch.run({0: 20, **rows}, admit=[batch.admit(0, prompt, params)], logprobs=True)
    batch.run({**rows, 0: 25}, logprobs=True)
    for _ in range(n - 1):
        batch.run({**rows, 0: 1}, logprobs=True)
    assert outcome(batch, 0) == expected


def test_hello_says_what_this_worker_is(worker):
    hello = worker.hello()
    assert (hello.model, hello.vocab_size, hello.max_model_len) == ("tiny", 512, 256)
    assert (hello.max_slots, hello.tiers[0].num_blocks, hello.block_size) == (20, 200, 16)
    assert hello.device == "cpu" and hello.dtype in ("float32", "bfloat16")
    assert len(hello.model_digest) == 32 and hello.worker_epoch
    assert [c.num_tokens for c in hello.step_costs][0] == 1 and hello.step_costs[0].micros > 0
    assert len({(c.num_tokens, c.num_context_tokens) for c in hello.step_costs}) == 4
    assert hello.system_fingerprint.startswith("fp_")


def test_the_metrics_page_counts_steps_and_tokens(folder):
    worker = Worker(config_for(folder))
    planner = planner_for(worker)
    plan = planner.plan({0: 20}, admit=[planner.admit(0, prompt_of(20))])
    worker.execute(plan)
    worker.execute(planner.plan({0: 1}))
    worker.execute(pb.StepPlan(epoch=planner.epoch, seq=9))
    page = worker.heartbeat().metrics.decode()
    samples = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }
    assert samples["quire_worker_steps_total", "ok"] == 2
    assert samples["quire_worker_steps_total", "refused"] == 1
    assert samples["quire_worker_tokens_total", "prefill"] == 20
    assert samples["quire_worker_tokens_total", "decode"] == 1
    assert samples["quire_worker_step_rows_sum",] == 2
    assert samples["quire_worker_kv_pool_bytes",] == 200 * worker.block_bytes
    assert samples["quire_worker_resident_memory_bytes",] > 1 << 20
    assert samples["quire_worker_step_part_seconds_count", "forward"] == 2


def test_a_worker_serves_from_a_thread_over_queues(folder):
    worker, link, stop = Worker(config_for(folder)), QueueLink(), threading.Event()
    thread = threading.Thread(target=daemon.serve, args=(worker, link.worker(), stop))
    thread.start()
    try:
        frames = []
        while not frames:
            frames = link.poll(5)
        peer, frame = frames[0]
        assert pb.WorkerFrame.FromString(frame).hello.model == "tiny"
        link.send(peer, pb.SchedulerFrame(welcome=pb.Welcome(epoch=1)).SerializeToString())
        planner = Planner(worker.runner)
        plan = planner.plan({0: 9}, admit=[planner.admit(0, prompt_of(9))])
        link.send(peer, pb.SchedulerFrame(plan=plan).SerializeToString())
        results = []
        while not results:
            messages = [pb.WorkerFrame.FromString(f) for _, f in link.poll(5)]
            results = [m.result for m in messages if m.WhichOneof("message") == "result"]
        assert results[0].status == pb.STEP_STATUS_OK
        assert results[0].worker_epoch == worker.worker_epoch
    finally:
        stop.set()
        thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"max_model_len": 5000}, ConfigError, "context of 1024"),
        ({"max_model_len": 1024, "num_gpu_blocks_override": 10}, ResourceError, "65 blocks"),
        ({"model": "/nowhere"}, ModelError, "/nowhere"),
        ({"device": "tpu"}, ConfigError, "tpu"),
    ],
)
def test_a_worker_that_cannot_start_says_why(folder, fields, error, words):
    with pytest.raises(error, match=words):
        Worker(config_for(folder, **fields))


def test_an_automatic_context_shrinks_to_the_pool(folder):
    worker = Worker(config_for(folder, max_model_len=0, num_gpu_blocks_override=10))
    assert worker.limits.max_model_len == 144


# -- as a process -----------------------------------------------------------------------------
def start(fields):
    code = (
        "import sys\nfrom quire.config import EngineConfig\nfrom quire_worker.main import run\n"
        f"sys.exit(run(EngineConfig(**{fields!r})))"
    )
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def fields_for(folder, **fields):
    return {
        "model": str(folder), "device": "cpu", "num_gpu_blocks_override": 20,
        "worker_metrics_port": 0, **fields,
    }  # fmt: skip


def test_start_up_errors_are_one_line_and_an_exit_status():
    process = start(fields_for("/nowhere"))
    _, text = process.communicate(timeout=60)
    assert process.returncode == 2
    assert text.startswith("Model error: ") and text.count("\n") == 1


def test_a_metrics_port_in_use_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        process = start(fields_for(folder, worker_metrics_port=port))
        _, text = process.communicate(timeout=60)
    assert process.returncode == 98
    assert str(port) in text.splitlines()[-1] and "--worker-metrics-port" in text


def test_sigterm_ends_a_serving_worker_with_status_0(folder):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    process = start(fields_for(folder, step_address=f"127.0.0.1:{port}"))
    try:
        assert router.poll(60_000)
        peer, frame = router.recv_multipart()
        assert pb.WorkerFrame.FromString(frame).hello.pid == process.pid
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
        router.close(0)
        context.term()


def test_the_host_tier_is_part_of_the_hello(folder):
    worker = Worker(config_for(folder, host_cache_memory=1 << 20))
    try:
        device, host = worker.hello().tiers
        assert (device.tier, host.tier) == (pb.TIER_DEVICE, pb.TIER_HOST)
        assert host.num_blocks == (1 << 20) // host.block_bytes > 0
        assert host.copy_micros > 0 == device.copy_micros
        planner = planner_for(worker)
        copy = pb.KvOp(
            kind=pb.KV_OP_KIND_OFFLOAD, src_block_ids=i32(3), dst_block_ids=i32(1),
            block_names=b"n" * 16,
        )  # fmt: skip
        planner.run(kv_ops=[copy])
        hello = worker.hello()
        assert (hello.held_host_block_ids, hello.held_host_block_names) == (i32(1), b"n" * 16)
        page = text_string_to_metric_families(worker.heartbeat().metrics.decode())
        size = next(f.samples[0].value for f in page if f.name == "quire_worker_host_kv_pool_bytes")
        assert size == host.num_blocks * host.block_bytes
    finally:
        worker.close()


def test_a_host_tier_smaller_than_a_block_is_an_error(folder):
    with pytest.raises(ConfigError, match="--host-cache-memory 100 holds not one KV block"):
        Worker(config_for(folder, host_cache_memory=100))
