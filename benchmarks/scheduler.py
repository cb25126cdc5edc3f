"""The scheduler's own time per step, by number of decoding rows; prefix look-ups and eviction too.

The engine's real code with a worker that is nothing but columns: every row decodes, block
boundaries are staggered so that one row in `block size` needs a block each step. Times are CPU
time of the thread, so other processes disturb them little. Needs no torch.

    plan      schedule(), the wire form, serialised             critical: the worker may wait
    result    parsed, checked, applied, columns for clients     critical
    deferred  naming, tree insertion, cost refit                while the worker computes
    encode    outputs as gRPC messages                          on the other thread, as a rule
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import google.protobuf
import numpy as np

from quire.config import EngineConfig
from quire.sampling import SamplingParams
from quire.v1 import step_pb2
from quire.wire import PROTOCOL_VERSION
from quire_scheduler.engine import Engine, Submission
from quire_scheduler.kv import KVHandle, KVManager, ModelIdentity, Namespace
from quire_scheduler.outputs import Outputs

PARTS = ("plan", "result", "deferred", "encode")
LIMITS_MS = {256: (0.1, 0.3), 4096: (0.3, 1.0), 10000: (0.6, 2.5)}  # rows -> critical, all
LOOKUP_LIMIT_US = 50.0
VOCAB = 32_000
IN_FLIGHT = 2  # plans, as with the real worker


class Wire:
    """Implements SchedulerLink: keeps the last plan, hands in what is put."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bytes]] = []
        self.plans: list[bytes] = []

    def send(self, peer: bytes, frame: bytes) -> bool:
        self.plans.append(frame)
        return True

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        taken, self.frames = self.frames, []
        return taken

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Client:
    """Keeps what it is given until it is encoded."""

    def __init__(self) -> None:
        self.parts: list[Outputs] = []

    def deliver(self, outputs: Outputs) -> None:
        self.parts.append(outputs)


class Bench:
    """An engine with `rows` requests that decode for ever, spread over `num_clients`."""

    def __init__(self, rows: int, num_clients: int, prompt: int, steps: int, block: int) -> None:
        self.rng = np.random.default_rng(0)
        self.rows, self.block, self.seq = rows, block, 0
        budget = max(8192, 2 * rows)
        start_up = 2 * rows * (prompt + block) // (budget - rows) + 8  # steps until all decode
        length = prompt + 2 * block + start_up + steps
        blocks = 1 + rows * (length // block + 1)
        config = EngineConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            max_waiting=rows,
            block_size=block,
        )
        self.wire = Wire()
        self.engine = Engine(config, self.wire)
        self.driver = self.engine._driver
        self.clients = [Client() for _ in range(num_clients)]
        hello = step_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            tp_size=1,
            pp_size=1,
            worker_epoch=1,
            model="columns",
            model_digest="00" * 16,
            block_size=block,
            tiers=[step_pb2.TierSize(tier=step_pb2.TIER_DEVICE, num_blocks=blocks)],
            max_slots=rows + max(4, rows // 8),
            max_model_len=length,
            vocab_size=VOCAB,
        )
        self.wire.frames.append((b"w", step_pb2.WorkerFrame(hello=hello).SerializeToString()))
        self.engine.turn(0)
        for handle in range(rows):
            tokens = self.rng.integers(3, VOCAB, prompt + handle % block).astype(np.int32)
            self.engine.submit(
                self.clients[handle % num_clients],
                Submission(handle, tokens, SamplingParams(max_tokens=length - len(tokens))),
            )
        self.engine._take_inbox()
        while not self._all_decode():
            self.step()

    def _all_decode(self) -> bool:
        state = self.driver.state
        assert state is not None
        return (
            not state.num_waiting
            and bool((state.columns.num_tokens[: self.rows] > 0).all())
            and all((plan.num_tokens == 1).all() for plan in state.in_flight)
            and len(state.in_flight) == IN_FLIGHT - 1
        )

    @property
    def num_used(self) -> int:
        assert self.driver.state is not None
        return self.driver.state.kv.num_used

    def answer(self, plan: step_pb2.StepPlan) -> bytes:
        """The frame of a worker whose rows all go on."""
        flags = np.frombuffer(plan.flags, np.uint8)
        slots = np.frombuffer(plan.slots, "<i4")[(flags & step_pb2.ROW_FLAG_SAMPLE) != 0]
        result = step_pb2.StepResult(
            epoch=plan.epoch,
            seq=plan.seq,
            worker_epoch=1,
            status=step_pb2.STEP_STATUS_OK,
            slots=slots.tobytes(),
            num_outputs=b"\1" * len(slots),
            token_ids=self.rng.integers(3, VOCAB, len(slots)).astype("<i4").tobytes(),
            finished=bytes(len(slots)),
            timings=step_pb2.StepTimings(forward_micros=20_000),
        )
        return step_pb2.WorkerFrame(result=result).SerializeToString()

    def step(self) -> list[int]:
        """One step, the worker IN_FLIGHT - 1 plans behind: nanoseconds of each of PARTS."""
        engine, driver, wire = self.engine, self.driver, self.wire
        state = driver.state
        assert state is not None
        clock = time.thread_time_ns
        a = clock()
        sent = driver.send_plan()
        b = clock()
        assert sent, "there is nothing to do"
        if len(state.in_flight) < IN_FLIGHT:
            driver.deferred()
            return [0] * len(PARTS)
        frame = step_pb2.SchedulerFrame()
        frame.ParseFromString(wire.plans.pop(0))
        while frame.WhichOneof("message") != "plan":
            frame.ParseFromString(wire.plans.pop(0))
        answer, now = self.answer(frame.plan), time.monotonic()
        c = clock()
        engine._on_frame(b"w", answer, now)
        engine._answer(now)
        d = clock()
        driver.deferred()
        e = clock()
        for client in self.clients:
            for outputs in client.parts:
                outputs.to_proto().SerializeToString()
            client.parts.clear()
        f = clock()
        return [b - a, d - c, e - d, f - e]


def step_times(
    rows: int, num_clients: int, prompt: int, steps: int, block: int
) -> dict[str, float]:
    """Milliseconds per step: the parts' medians, and medians and 99th percentiles of their sums."""
    bench = Bench(rows, num_clients, prompt, steps, block)
    gc.collect()
    gc.freeze()  # as the service does after its start
    for _ in range(block):
        bench.step()
    before = bench.num_used
    times = np.array([bench.step() for _ in range(steps)]) / 1e6  # [steps, parts]
    blocks = (bench.num_used - before) / steps
    bench.engine.check()
    critical, everything = times[:, :2].sum(1), times.sum(1)
    found = dict(zip(PARTS, np.median(times, 0).tolist(), strict=True))
    found |= {"critical": float(np.median(critical)), "all": float(np.median(everything))}
    found |= {"critical_mean": float(critical.mean()), "all_mean": float(everything.mean())}
    return found | {"critical_p99": float(np.quantile(critical, 0.99)), "new_blocks": blocks}


def make_kv(num_blocks: int, block: int, policy: str) -> KVManager:
    identity = ModelIdentity(b"m" * 16, "float32", "float32")
    return KVManager(
        num_blocks,
        block,
        identity,
        eviction_policy=policy,
        max_requests=4,
    )


def lookup_time(num_tokens: int, block: int, repeats: int = 200) -> float:
    """Microseconds, median, of match_prefix on a prompt that is cached but for its last token."""
    kv = make_kv(2 * num_tokens // block, block, "lru")
    tokens = np.random.default_rng(0).integers(0, VOCAB, num_tokens + 1).astype(np.int32)
    fill(kv, tokens)
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        cached, handle = kv.match_prefix(tokens, Namespace())
        times.append(time.thread_time_ns() - start)
        assert cached == num_tokens
        kv.release(handle)
    return float(np.median(times)) / 1e3


def fill(kv: KVManager, tokens: np.ndarray) -> None:
    """A request that computed `tokens` and is gone."""
    _, handle = kv.match_prefix(tokens, Namespace())
    missing = -(-len(tokens) // kv.block_size) - handle.num_blocks
    assert kv.allocate_for(handle, missing) is not None
    kv.publish(handle, tokens, 1)
    kv.release(handle)


def eviction_time(num_blocks: int, block: int, policy: str, count: int) -> float:
    """Microseconds per block evicted, one at a time, from a full cache of chats: a stem of two
    blocks for every eight leaves of two."""
    kv = make_kv(num_blocks, block, policy)
    rng = np.random.default_rng(0)
    stem = np.zeros(0, np.int32)
    leaves = 0
    while kv.num_free >= 5:
        if leaves % 8 == 0:
            stem = rng.integers(0, VOCAB, 2 * block).astype(np.int32)
        leaves += 1
        fill(kv, np.concatenate((stem, rng.integers(0, VOCAB, 2 * block).astype(np.int32))))
    held: list[KVHandle] = []
    _, handle = kv.match_prefix(np.zeros(1, np.int32), Namespace())
    held.append(handle)
    assert kv.allocate_for(handle, kv.num_free) is not None
    before = kv.stats.evicted_blocks
    start = time.thread_time_ns()
    for _ in range(count):
        kv.allocate_for(handle, 1)
    spent = time.thread_time_ns() - start
    assert kv.stats.evicted_blocks - before == count
    return spent / count / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096, 10_000])
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="of evictions"
    )
    parser.add_argument("--evictions", type=int, default=5000, help="blocks evicted in each")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    show: Callable[[str], int] = lambda line: sys.stdout.write(line + "\n")  # noqa: E731
    columns = (*PARTS, "critical", "all", "critical_p99")
    record: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "protobuf": google.protobuf.__version__,
        "command": sys.argv[1:],
    }
    steps: dict[int, dict[str, float]] = {}
    show("milliseconds a step, medians; limits in brackets")
    show(f"{'rows':>6} " + " ".join(f"{name:>12}" for name in columns))
    for rows in options.rows:
        found = steps[rows] = step_times(
            rows, options.clients, options.prompt, options.steps, options.block_size
        )
        line = f"{rows:>6} " + " ".join(f"{found[name]:12.3f}" for name in columns)
        if rows in LIMITS_MS:
            line += "   ({} / {})".format(*LIMITS_MS[rows])
        show(line)
    record["steps_ms"] = steps
    record["blocks_per_step"] = {rows: found.pop("new_blocks") for rows, found in steps.items()}
    lookup = record["lookup_32k_us"] = lookup_time(32_768, options.block_size)
    show(f"\nlook-up of a cached prompt of 32k tokens: {lookup:.1f} us ({LOOKUP_LIMIT_US:.0f})")
    evictions: dict[str, dict[int, float]] = {}
    if options.blocks:
        show("\nmicroseconds a block evicted, by blocks cached")
        show(f"{'policy':>6} " + " ".join(f"{blocks:>12,}" for blocks in options.blocks))
    for policy in ("lru", "lfu", "fifo") if options.blocks else ():
        evictions[policy] = {
            blocks: eviction_time(blocks, options.block_size, policy, options.evictions)
            for blocks in options.blocks
        }
        show(f"{policy:>6} " + " ".join(f"{us:12.2f}" for us in evictions[policy].values()))
    record["eviction_us"] = evictions
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
