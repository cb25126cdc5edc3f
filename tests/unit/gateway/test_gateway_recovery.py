"""The engine stream: cancels, loss, resubmission, late and broken frames."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_builders import IM_END, served, until

from fakes.engine_server import ERROR, STOP, FakeEngine, Reply, Row
from quire.v1 import common_pb2
from quire.wire import unpack_i32

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi", "max_tokens": 400}
LONG = "a long story about one fox " * 4


def tells(text: str, **kwargs: Any) -> Reply:
    return Reply([*text.encode(), IM_END], **kwargs)


def text_of(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["text"] for c in chunks)


async def test_disconnect_cancels(folder: Path) -> None:
    async with FakeEngine(Reply(b"x" * 300, delay=0.01)) as engine, served(engine, folder) as s:
        for stream in (True, False):
            seen = len(engine.submits)
            async with aiohttp.ClientSession() as client:
                call = asyncio.create_task(
                    client.post(s.url + "/v1/completions", json=TEXT | {"stream": stream})
                )
                await engine.wait(lambda seen=seen: len(engine.submits) > seen)
                if stream:
                    response = await call
                    await response.content.readline()
                    response.close()
                else:
                    call.cancel()
            await engine.wait(lambda seen=seen: len(engine.cancels) > seen)
        await until(lambda: s.gateway.active == 0)
        assert s.gateway.engine.num_open == 0
        page = await (await s.http.get(s.url + "/metrics")).text()
    assert 'quire_requests_total{service="gateway",finish_reason="abort"} 2.0' in page


async def test_stream_goes_on_after_the_loss_of_the_engine_stream(folder: Path) -> None:
    async with FakeEngine(tells(LONG, delay=0.002)) as engine, served(engine, folder) as s:
        engine.drop_after = 20
        chunks = await s.chunks("/v1/completions", TEXT | {"seed": 3})
    assert text_of(chunks) == LONG
    first, second = engine.submits
    assert (first.handle, first.attempt, second.attempt) == (second.handle, 0, 1)
    assert 0 < len(unpack_i32(second.output_token_ids)) <= 20
    assert second.prompt_token_ids == first.prompt_token_ids
    assert second.sampling_params == first.sampling_params and first.sampling_params.seed == 3


async def test_many_streams_survive_the_engine_being_restarted(folder: Path) -> None:
    async with FakeEngine(tells(LONG, delay=0.003)) as engine, served(engine, folder) as s:
        calls = [asyncio.create_task(s.chunks("/v1/completions", TEXT)) for _ in range(8)]
        await until(lambda: s.gateway.engine.num_open == 8)
        for _ in range(2):
            await asyncio.sleep(0.05)
            await engine.stop()
            await engine.start()
            await until(lambda: s.gateway.engine.connected)
        for chunks in await asyncio.gather(*calls):
            assert text_of(chunks) == LONG
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {submit.attempt for submit in engine.submits} >= {0, 1}


async def test_new_requests_wait_for_the_engine(folder: Path) -> None:
    async with FakeEngine(tells("ok")) as engine, served(engine, folder) as s:
        await engine.stop()
        await until(lambda: not s.gateway.engine.connected)
        call = asyncio.create_task(s.post("/v1/completions", TEXT))
        await until(lambda: s.gateway.engine.num_open == 1)
        await engine.start()
        status, body, _ = await call
    assert status == 200 and body["choices"][0]["text"] == "ok"


async def test_waiting_for_the_engine_ends_with_503(folder: Path) -> None:
    reply = Reply(b"x" * 300, delay=0.01)
    async with FakeEngine(reply) as engine, served(engine, folder, reconnect_timeout=0.3) as s:
        running = asyncio.create_task(s.events("/v1/completions", TEXT))
        await until(lambda: s.gateway.metrics.ttft._sum.get() > 0)
        await engine.stop()
        events = await running
        status, body, headers = await s.post("/v1/completions", TEXT)
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "scheduler_unavailable" and "data: [DONE]" not in events
    assert status == 503 and body["error"]["code"] == "scheduler_unavailable"
    assert int(headers["Retry-After"]) >= 1


async def test_a_scheduler_that_loads_is_not_away(folder: Path) -> None:
    """However long its worker takes: what waits is served once the model is there."""
    async with (
        FakeEngine(tells("ok")) as engine,
        served(engine, folder, reconnect_timeout=0.3) as s,
    ):
        await engine.stop()
        await until(lambda: not s.gateway.engine.connected)
        engine.model.ready = False
        await engine.start()
        await until(lambda: s.gateway.engine.status == "the engine is loading")
        call = asyncio.create_task(s.post("/v1/completions", TEXT))
        await asyncio.sleep(0.8)
        assert not call.done()
        engine.model.ready = True
        status, body, _ = await call
    assert status == 200 and body["choices"][0]["text"] == "ok"


@pytest.fixture
async def manual(folder: Path) -> Any:
    """A silent engine, one open stream, and what the test sends as rows."""
    async with FakeEngine() as engine, served(engine, folder) as s:
        engine.silent = True
        call = asyncio.create_task(s.chunks("/v1/completions", TEXT))
        await engine.wait(lambda: engine.submits)
        yield engine, engine.submits[0], call


async def test_duplicates_and_other_attempts_are_dropped(manual: Any) -> None:
    engine, submit, call = manual
    h = submit.handle
    engine.attachments[0].send(
        Row(h, 0, 0, b"ab", num_cached_tokens=5),
        Row(h, 0, 0, b"ab", num_cached_tokens=9),
        Row(h, 7, 2, b"XX"),
        Row(h, 0, 1, b"bc"),
        Row(h + 1, 0, 0, b"YY", finish_reason=STOP),
        Row(h, 0, 3, b"d"),
        Row(h, 0, 4, (), finish_reason=common_pb2.FINISH_REASON_LENGTH),
        Row(h, 0, 4, b"Z", finish_reason=STOP),
    )
    assert text_of(await call) == "abcd"


async def test_missing_tokens_lead_to_a_new_attempt(manual: Any) -> None:
    engine, submit, call = manual
    engine.attachments[0].send(Row(submit.handle, 0, 0, b"ab"))
    engine.attachments[0].send(Row(submit.handle, 0, 5, b"f"))
    await engine.wait(lambda: len(engine.submits) == 2)
    again = engine.submits[1]
    assert again.attempt == 1 and list(unpack_i32(again.output_token_ids)) == list(b"ab")
    engine.attachments[1].send(Row(again.handle, 0, 2, b"stale"), Row(again.handle, 1, 2, b"cd"))
    engine.attachments[1].send(Row(again.handle, 1, 4, [IM_END], finish_reason=STOP))
    assert text_of(await call) == "abcd"


async def test_frames_that_make_no_sense_lead_to_a_new_attempt(manual: Any) -> None:
    from quire.v1 import engine_pb2

    engine, submit, call = manual
    for frame in (
        engine_pb2.AttachResponse(handles=b"123"),
        engine_pb2.AttachResponse(handles=b"1234"),
        engine_pb2.AttachResponse(logprobs=common_pb2.LogprobColumns(counts=b"1234")),
    ):
        seen = len(engine.attachments)
        engine.attachments[-1].outbox.put_nowait(frame)
        await engine.wait(lambda seen=seen: len(engine.submits) > seen)
    attempt = engine.submits[-1].attempt
    assert attempt == 3
    row = Row(submit.handle, attempt, 0, b"fine", finish_reason=common_pb2.FINISH_REASON_LENGTH)
    engine.attachments[-1].send(row)
    assert text_of(await call) == "fine"


async def test_deaths_travel_back(manual: Any) -> None:
    engine, submit, call = manual
    engine.attachments[0].send(Row(submit.handle, 0, 0, b"a", deaths=1))
    engine.attachments[0].drop()
    await engine.wait(lambda: len(engine.submits) == 2)
    assert engine.submits[1].deaths == 1
    row = Row(submit.handle, 1, 1, (), finish_reason=common_pb2.FINISH_REASON_LENGTH)
    engine.attachments[1].send(row)
    assert text_of(await call) == "a"


async def test_abort_and_unknown_errors_are_told(folder: Path) -> None:
    strange = common_pb2.Error(name="no_such_error", message="Odd.", param="n")
    for reply, code in [
        (Reply(b"", finish_reason=common_pb2.FINISH_REASON_ABORT), "cancelled"),
        (Reply(b"", finish_reason=ERROR), "internal_error"),
        (Reply(b"", error=strange), "internal_error"),
    ]:
        async with FakeEngine(reply) as engine, served(engine, folder) as s:
            _, body, _ = await s.post("/v1/completions", TEXT)
            assert body["error"]["code"] == code


async def test_replaced_model_fails_what_was_open(folder: Path) -> None:
    async with FakeEngine(Reply(b"x" * 300, delay=0.01)) as engine, served(engine, folder) as s:
        call = asyncio.create_task(s.post("/v1/completions", TEXT))
        await until(lambda: s.gateway.engine.num_open == 1)
        engine.model.model_digest = "another"
        await engine.stop()
        await engine.start()
        status, body, _ = await call
    assert status == 503 and "replaced" in body["error"]["message"]


async def test_reader_that_does_not_read_is_cut_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire_gateway import serve, sse

    class Impatient(sse.EventStream):
        def __init__(self, request: Any) -> None:
            super().__init__(request, write_timeout=0.2)
            sock = request.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            request.transport.set_write_buffer_limits(4096)

    monkeypatch.setattr(serve, "EventStream", Impatient)
    reply = Reply(b"x" * 400_000, chunk=4000, delay=0.001, hang=True)
    async with FakeEngine(reply, max_model_len=1 << 20) as engine, served(engine, folder) as s:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(s.url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        body = json.dumps(TEXT | {"stream": True, "max_tokens": 400_000}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        await engine.wait(lambda: engine.cancels)
        await until(lambda: s.gateway.active == 0)
        assert (await s.get("/ping"))[0] == 200
        writer.close()


async def test_silent_stream_is_not_taken_for_dead(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire_gateway import engine_client

    quick = dict(engine_client.CHANNEL_OPTIONS) | {
        "grpc.keepalive_time_ms": 100,
        "grpc.http2.min_ping_interval_without_data_ms": 100,
    }
    monkeypatch.setattr(engine_client, "CHANNEL_OPTIONS", list(quick.items()))
    async with FakeEngine(tells("ok", first_delay=2.0)) as engine, served(engine, folder) as s:
        _, body, _ = await s.post("/v1/completions", TEXT)
    assert body["choices"][0]["text"] == "ok"
    assert len(engine.attachments) == 1, "pings must not count as abuse"
