"""EngineService over real gRPC on a free port, with a simulated worker in a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fakes.worker import FakeWorker, Options, embedding, oracle
from quire.config import EngineConfig
from quire.errors import AddressInUse
from quire.link import QueueLink
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc
from quire_scheduler.bridge import OutputStream
from quire_scheduler.engine import Engine
from quire_scheduler.metrics import MetricsPage
from quire_scheduler.outputs import one_row
from quire_scheduler.server import SERVICE, Server
from quire_scheduler.throughput import Throughput

CODE = grpc.StatusCode


@dataclass
class Running:
    engine: Engine
    worker: FakeWorker
    channel: Any
    stub: Any
    port: int

    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)


@contextlib.asynccontextmanager
async def serving(
    options: Options | None = None, *, worker: bool = True, **config: Any
) -> AsyncIterator[Running]:
    config.setdefault("model", "fake")
    settings = EngineConfig(**config)
    link = QueueLink()
    engine = Engine(settings, link)
    fake = FakeWorker(link.worker(), options or Options(num_blocks=512, max_slots=80))
    server = Server(engine, settings, MetricsPage(engine, Throughput(engine)))
    port = await server.start("127.0.0.1:0")
    engine.start()
    if worker:
        fake.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    running = Running(engine, fake, channel, engine_pb2_grpc.EngineServiceStub(channel), port)
    try:
        if worker:
            await until(lambda: engine.stats().ready)
        yield running
    finally:
        await channel.close()
        await server.stop(0)
        fake.stop()
        engine.stop()
    assert fake.violations == []


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def generate(prompt: list[int], **rest: Any) -> engine_pb2.GenerateRequest:
    fields = {k: rest.pop(k) for k in ("model", "request_id", "adapter") if k in rest}
    rest.setdefault("seed", 7)
    return engine_pb2.GenerateRequest(
        prompt_token_ids=prompt, sampling_params=common_pb2.SamplingParams(**rest), **fields
    )


def submit(handle: int, prompt: list[int], **rest: Any) -> engine_pb2.AttachRequest:
    rest.setdefault("seed", 7)
    return engine_pb2.AttachRequest(
        submit=engine_pb2.Submit(
            handle=handle,
            request_id=f"r{handle}",
            prompt_token_ids=np.array(prompt, "<i4").tobytes(),
            sampling_params=common_pb2.SamplingParams(**rest),
        )
    )


HELLO = engine_pb2.AttachRequest(
    hello=engine_pb2.AttachHello(gateway_id="test", protocol_version=1)
)


class Streams:
    """Reads an Attach call into {handle: tokens}."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, int] = {}
        self.failures: dict[int, common_pb2.Error] = {}
        self.num_frames = 0

    async def read(self) -> None:
        message = await self.call.read()
        assert message is not grpc.aio.EOF
        self.num_frames += 1
        handles = np.frombuffer(message.handles, "<u4").tolist()
        counts = np.frombuffer(message.num_tokens, "<u4").tolist()
        tokens = np.frombuffer(message.token_ids, "<i4").tolist()
        for handle, count, reason in zip(handles, counts, message.finish_reasons, strict=True):
            self.tokens.setdefault(handle, []).extend(tokens[:count])
            tokens = tokens[count:]
            if reason:
                assert handle not in self.reasons
                self.reasons[handle] = reason
        for failure in message.failures:
            self.failures[failure.handle] = failure.error

    async def until_finished(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.reasons) < count:
                await self.read()


async def attach(running: Running) -> Streams:
    call = running.stub.Attach()
    await call.write(HELLO)
    first = await call.read()
    assert first.welcome.protocol_version == 1 and first.welcome.scheduler_epoch >= 1
    return Streams(call)


async def test_generate_streams_and_ends_with_usage():
    async with serving() as running:
        answers = [a async for a in running.stub.Generate(generate([5, 6], max_tokens=20))]
        tokens = [t for a in answers for t in a.token_ids]
        assert tokens == oracle([5, 6], seed=7, max_tokens=20)[0]
        last = answers[-1]
        assert last.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert (last.usage.num_prompt_tokens, last.usage.num_output_tokens) == (2, 20)
        assert last.request_id and not any(a.HasField("usage") for a in answers[:-1])


async def test_generate_names_the_stop_token():
    async with serving(Options(num_blocks=512, eos_every=3)) as running:
        answers = [a async for a in running.stub.Generate(generate([5], model="fake"))]
        assert answers[-1].finish_reason == common_pb2.FINISH_REASON_STOP
        assert answers[-1].stop_token_id == 2


async def test_generate_with_logprobs():
    async with serving() as running:
        call = running.stub.Generate(generate([5], max_tokens=4, logprobs=2))
        counts = b"".join([a.logprobs.counts async for a in call])
        assert np.frombuffer(counts, "<u4").tolist() == [3] * 4


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (generate([]), CODE.INVALID_ARGUMENT, "at least one token"),
        (generate([5000]), CODE.INVALID_ARGUMENT, "5000"),
        (generate([5] * 600), CODE.INVALID_ARGUMENT, "512"),
        (generate([5], temperature=float("nan")), CODE.INVALID_ARGUMENT, "temperature"),
        (generate([5], model="other"), CODE.NOT_FOUND, "'other'"),
        (generate([5], adapter="x"), CODE.UNIMPLEMENTED, "Adapters"),
    ],
)
async def test_generate_answers_bad_requests_with_their_status(request_, code, says):
    async with serving() as running:
        error = await status_of(running.stub.Generate(request_))
        assert error.code() == code and says in error.details()
        assert dict(error.trailing_metadata())["quire-error"]


async def test_a_full_queue_says_when_to_retry():
    async with serving(max_num_seqs=1, max_waiting=0) as running:
        call = running.stub.Generate(generate([5], max_tokens=500))
        await call.read()
        error = await status_of(running.stub.Generate(generate([6])))
        assert error.code() == CODE.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 0
        call.cancel()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_caller_that_leaves_frees_its_blocks(how):
    async with serving(Options(num_blocks=512, latency=lambda n: 0.005)) as running:
        timeout = 0.3 if how == "deadline" else None
        call = running.stub.Generate(generate([5], max_tokens=500), timeout=timeout)
        await call.read()
        assert running.engine.stats().num_running == 1
        if how == "cancel":
            call.cancel()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while True:
                    await call.read()
            assert caught.value.code() == CODE.DEADLINE_EXCEEDED
        await until(lambda: running.engine.stats().num_running == 0)
        assert running.engine.stats().num_blocks_used == 0
        running.engine.check()


async def test_attach_multiplexes_64_requests():
    async with serving() as running:
        streams = await attach(running)
        for i in range(64):
            await streams.call.write(submit(i, [5 + i, 9], max_tokens=30))
        await streams.until_finished(64)
        for i in range(64):
            assert streams.tokens[i] == oracle([5 + i, 9], seed=7, max_tokens=30)[0]
        running.engine.check()


async def test_attach_answers_refusals_as_failures_and_goes_on():
    async with serving() as running:
        streams = await attach(running)
        await streams.call.write(submit(1, [5000], max_tokens=3))
        broken = submit(2, [5])
        broken.submit.prompt_token_ids = b"\x01\x02\x03"
        await streams.call.write(broken)
        await streams.call.write(submit(3, [5], max_tokens=3))
        await streams.until_finished(3)
        assert streams.failures[1].name == streams.failures[2].name == "invalid_request"
        assert "3 bytes" in streams.failures[2].message
        assert len(streams.tokens[3]) == 3


async def test_attach_cancel_and_close():
    async with serving(Options(num_blocks=512, latency=lambda n: 0.002)) as running:
        streams = await attach(running)
        for i in range(3):
            await streams.call.write(submit(i, [5 + i], max_tokens=450))
        await streams.read()
        cancel = engine_pb2.Cancel(handle=0)
        await streams.call.write(engine_pb2.AttachRequest(cancel=cancel))
        await until(lambda: running.engine.stats().num_running == 2)
        await streams.call.done_writing()
        await until(lambda: running.engine.stats().num_running == 0)
        running.engine.check()


async def test_attach_without_a_hello_is_refused():
    async with serving() as running:
        call = running.stub.Attach()
        await call.write(submit(1, [5]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == CODE.INVALID_ARGUMENT
        old = engine_pb2.AttachHello(gateway_id="x", protocol_version=7)
        call = running.stub.Attach()
        await call.write(engine_pb2.AttachRequest(hello=old))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert "protocol 7" in caught.value.details()


async def test_two_gateways_do_not_see_each_other():
    async with serving() as running:
        one, two = await attach(running), await attach(running)
        await one.call.write(submit(1, [5], max_tokens=9))
        await two.call.write(submit(1, [6], max_tokens=9))
        await asyncio.gather(one.until_finished(1), two.until_finished(1))
        assert one.tokens[1] == oracle([5], seed=7, max_tokens=9)[0]
        assert two.tokens[1] == oracle([6], seed=7, max_tokens=9)[0]


async def test_a_stream_nobody_reads_is_merged_and_never_makes_the_engine_wait():
    stream = OutputStream(asyncio.get_running_loop())
    for i in range(1000):
        stream.deliver(one_row(i, 0, 0, 0))
    merged = await stream.next()
    assert merged.handles.tolist() == list(range(1000))
    stream.deliver(one_row(7, 0, 0, 2))
    assert (await stream.next()).handles.tolist() == [7]
    stream.close()
    stream.deliver(one_row(8, 0, 0, 2))


async def test_pings_on_a_silent_stream_are_no_abuse():
    """Twenty pings while nothing comes: by gRPC's defaults the third would end the connection."""
    async with serving(Options(num_blocks=512, latency=lambda n: 2.0)) as running:
        options = [
            ("grpc.keepalive_time_ms", 100),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        address = f"127.0.0.1:{running.port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            answers = [a async for a in stub.Generate(generate([5], max_tokens=1))]
            assert len(answers) == 1


async def test_model_and_load():
    async with serving(Options(num_blocks=512, heartbeats=True)) as running:
        await until(lambda: running.engine.stats().worker_metrics)
        model = await running.stub.GetModel(engine_pb2.GetModelRequest())
        assert (model.model, model.ready, model.vocab_size) == ("fake", True, 997)
        assert (model.num_blocks, model.max_model_len) == (511, 512)
        load = await running.stub.GetLoad(engine_pb2.GetLoadRequest())
        assert load.healthy and load.num_blocks_total == 511 and load.memory_bytes > 1 << 20
        pages = {m.service: m.text for m in load.metrics}
        assert b"quire_requests_running" in pages["scheduler"]
        assert pages["worker-0"] == b"# worker page\n"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("LoadAdapter", engine_pb2.LoadAdapterRequest()),
        ("UnloadAdapter", engine_pb2.UnloadAdapterRequest()),
    ],
)
async def test_what_is_not_served_says_so(method, message):
    async with serving() as running:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(running.stub, method)(message)
        assert caught.value.code() == CODE.UNIMPLEMENTED
        assert "serve" in caught.value.details()


async def test_embed_answers_with_one_vector():
    async with serving() as running:
        answer = await running.stub.Embed(engine_pb2.EmbedRequest(prompt_token_ids=[5, 6, 7]))
        assert np.frombuffer(answer.embedding, "<f4").tolist() == embedding([5, 6, 7])
        assert answer.usage.num_prompt_tokens == 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Embed(engine_pb2.EmbedRequest())
        assert caught.value.code() == CODE.INVALID_ARGUMENT


async def test_health_follows_the_worker():
    async with serving(worker=False) as running:
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await running.health().Check(request)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        model = await running.stub.GetModel(engine_pb2.GetModelRequest())
        assert not model.ready and "rank 0" in model.status
        error = await status_of(running.stub.Generate(generate([5])))
        assert error.code() == CODE.UNAVAILABLE
        running.worker.start()
        watch = running.health().Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        async with asyncio.timeout(10):
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.health().Check(health_pb2.HealthCheckRequest(service="none"))
        assert caught.value.code() == CODE.NOT_FOUND


async def test_reflection_lists_the_services():
    async with serving() as running:
        stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        answer = await anext(aiter(call))
        names = {s.name for s in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        call.cancel()


async def test_drain_refuses_newcomers_and_waits():
    async with serving(Options(num_blocks=512, latency=lambda n: 0.002)) as running:
        call = running.stub.Generate(generate([5], max_tokens=60))
        await call.read()
        drained = asyncio.ensure_future(running.stub.Drain(engine_pb2.DrainRequest(timeout_s=20)))
        await until(lambda: running.engine.stats().draining)
        error = await status_of(running.stub.Generate(generate([6])))
        assert error.code() == CODE.UNAVAILABLE and "shutting down" in error.details()
        assert (await drained).num_unfinished == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Drain(engine_pb2.DrainRequest(timeout_s=-1))
        assert caught.value.code() == CODE.INVALID_ARGUMENT


async def test_a_taken_port_is_an_error():
    async with serving() as running:
        config = EngineConfig()
        other = Server(
            running.engine, config, MetricsPage(running.engine, Throughput(running.engine))
        )
        with pytest.raises(AddressInUse, match="--engine-address"):
            await other.start(f"127.0.0.1:{running.port}")
        await other.stop(0)


async def test_a_full_engine_refuses_a_call_with_the_time_to_wait():
    slow = Options(num_blocks=512, max_slots=8, latency=lambda tokens: 0.01)
    async with serving(slow, max_num_seqs=1, max_waiting=0) as running:
        first = running.stub.Generate(generate([5], max_tokens=300, ignore_eos=True))
        await first.read()
        call = running.stub.Generate(generate([6]))
        assert await call.code() == CODE.RESOURCE_EXHAUSTED
        trailing = dict(await call.trailing_metadata())
        assert trailing["quire-error"] == "queue_full"
        assert 50 <= int(trailing["retry-after-ms"]) <= 60_000
        streams = await attach(running)
        await streams.call.write(submit(1, [7]))
        await streams.until_finished(1)
        assert streams.failures[1].name == "queue_full"
        assert 0.05 <= streams.failures[1].retry_after_s <= 60
        first.cancel()
        await until(lambda: running.engine._intake.num_live == 0)
        await streams.call.write(submit(2, [7], max_tokens=2))
        await streams.until_finished(2)
        assert streams.reasons[2] == common_pb2.FINISH_REASON_LENGTH


async def test_blocks_can_be_asked_who_has_them():
    async with serving() as running:
        describe = running.stub.DescribeBlocks
        prompt = list(range(3, 60))
        for _ in range(2):  # the second finds what the first has left
            async for _ in running.stub.Generate(generate(prompt, max_tokens=2)):
                pass
        answer = await describe(engine_pb2.DescribeBlocksRequest(limit=2))
        assert answer.num_blocks == 511 and answer.block_size == 16
        assert answer.num_used + answer.num_cached + answer.num_free == 511
        shared = answer.blocks[0]
        assert (shared.state, shared.hits, len(answer.blocks)) == ("cached", 1, 2)
        assert len(shared.name) == 16 and shared.age_s >= 0 and not shared.owners
        call = running.stub.Generate(generate(prompt, request_id="me", max_tokens=400))
        await call.read()
        held = await describe(engine_pb2.DescribeBlocksRequest(block_ids=[shared.block_id, 0]))
        assert list(held.blocks[0].owners) == ["me"] and held.blocks[0].state == "used"
        assert held.blocks[1].state == "null" and not held.blocks[1].HasField("age_s")
        call.cancel()
        for wrong in (
            {"block_ids": [512]}, {"block_ids": range(300)}, {"limit": 1000}, {"tier": "disk"},
            {"block_ids": [0], "tier": "host"},
        ):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await describe(engine_pb2.DescribeBlocksRequest(**wrong))
            assert caught.value.code() == CODE.INVALID_ARGUMENT
