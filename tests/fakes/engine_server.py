"""FakeEngine: an EngineService on a free port that answers from a script.

Lets the gateway be tested whole, over real sockets, without scheduler, worker or model. It
keeps the Attach contract (columns, attempts, first indices) and can break it on purpose.
Knows no text: a script is token ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from quire.sampling import SamplingParams
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc
from quire.wire import PROTOCOL_VERSION, pack_f32, pack_i32, pack_u32, unpack_i32

STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH
ERROR = common_pb2.FINISH_REASON_ERROR
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", -1),
]


@dataclass
class Reply:
    """What the fake answers to one Submit: tokens, then the finish, `delay` seconds between
    messages of `chunk` tokens, `first_delay` before the first one. error: fail after the
    tokens. hang: never finish."""

    token_ids: Sequence[int] = (65, 66, 67)
    finish_reason: int = 0  # 0: LENGTH when max_tokens cuts it, else STOP
    delay: float = 0.0
    first_delay: float = 0.0
    chunk: int = 1
    error: common_pb2.Error | None = None
    stop_token_id: int = -1
    hang: bool = False
    num_cached_tokens: int = 0


Script = Callable[[engine_pb2.Submit], Reply]


@dataclass
class Row:
    """One row of an AttachResponse."""

    handle: int
    attempt: int
    first_index: int
    token_ids: Sequence[int] = ()
    finish_reason: int = 0
    stop_token_id: int = -1
    num_cached_tokens: int = 0
    deaths: int = 0
    logprobs: int | None = None
    error: common_pb2.Error | None = None


def response(rows: Sequence[Row]) -> engine_pb2.AttachResponse:
    """The columnar message of these rows."""
    message = engine_pb2.AttachResponse(
        handles=pack_u32(r.handle for r in rows),
        attempts=pack_u32(r.attempt for r in rows),
        first_indices=pack_u32(r.first_index for r in rows),
        num_tokens=pack_u32(len(r.token_ids) for r in rows),
        token_ids=pack_i32(t for r in rows for t in r.token_ids),
        finish_reasons=bytes(r.finish_reason for r in rows),
        stop_token_ids=pack_i32(r.stop_token_id for r in rows),
        num_cached_tokens=pack_u32(r.num_cached_tokens for r in rows),
        deaths=pack_u32(r.deaths for r in rows),
        failures=[
            engine_pb2.Failure(handle=r.handle, attempt=r.attempt, error=r.error)
            for r in rows
            if r.error is not None
        ],
    )
    if any(r.logprobs is not None for r in rows):
        counts, ids, values = [], [], []
        for row in rows:
            for token in row.token_ids:
                top = [] if row.logprobs is None else [token, *range(row.logprobs)]
                counts.append(len(top))
                ids += top
                values += [-0.5 * (k + 1) for k in range(len(top))]
        message.logprobs.CopyFrom(
            common_pb2.LogprobColumns(
                counts=pack_u32(counts), token_ids=pack_i32(ids), logprobs=pack_f32(values)
            )
        )
    return message


@dataclass
class Attachment:
    """One Attach stream of a gateway."""

    outbox: asyncio.Queue[engine_pb2.AttachResponse | None] = field(default_factory=asyncio.Queue)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    num_sent: int = 0

    def send(self, *rows: Row) -> None:
        self.outbox.put_nowait(response(rows))

    def drop(self) -> None:
        """End the stream as a dying scheduler does."""
        self.outbox.put_nowait(None)


class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """Use as `async with FakeEngine(script) as engine`. Everything it saw is in `submits`,
    `cancels` and `attachments`; `changed` is notified at each of them."""

    def __init__(self, script: Script | Reply | None = None, **model: Any) -> None:
        reply = script or Reply()
        self.script: Script = reply if callable(reply) else (lambda submit: reply)
        self.model = engine_pb2.GetModelResponse(
            **{
                "model": "fake", "model_digest": "00ff", "max_model_len": 512, "vocab_size": 300,
                "eos_token_ids": [258], "dtype": "float32", "system_fingerprint": "fp_fake",
                "ready": True, "device": "cpu", **model,
            }
        )  # fmt: skip
        self.load = engine_pb2.GetLoadResponse(healthy=True)
        self.submits: list[engine_pb2.Submit] = []
        self.cancels: list[engine_pb2.Cancel] = []
        self.attachments: list[Attachment] = []
        self.drop_after: int | None = None  # end a stream after this many messages, once
        self.silent = False  # take submits, answer nothing
        self.changed = asyncio.Condition()
        self.port = 0
        self._server: Any = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; again on the same port after a stop()."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Die: every stream is cut."""
        for attachment in self.attachments:
            for task in attachment.tasks.values():
                task.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def wait(self, condition: Callable[[], Any], timeout: float = 10.0) -> None:
        """Until the condition holds; looked at whenever the fake sees a message."""
        async with asyncio.timeout(timeout), self.changed:
            await self.changed.wait_for(condition)

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # -- EngineService
    async def GetModel(self, request: Any, context: Any) -> engine_pb2.GetModelResponse:
        return self.model

    async def GetLoad(self, request: Any, context: Any) -> engine_pb2.GetLoadResponse:
        return self.load

    async def Attach(self, requests: Any, context: Any) -> Any:
        attachment = Attachment()
        self.attachments.append(attachment)
        reader = asyncio.create_task(self._listen(requests, attachment))
        yield engine_pb2.AttachResponse(
            welcome=engine_pb2.AttachWelcome(scheduler_epoch=1, protocol_version=PROTOCOL_VERSION)
        )
        try:
            while True:
                message = await attachment.outbox.get()
                if message is None:
                    break
                yield message
                attachment.num_sent += 1
                if self.drop_after is not None and attachment.num_sent >= self.drop_after:
                    self.drop_after = None
                    break
        finally:
            reader.cancel()
            for task in attachment.tasks.values():
                task.cancel()

    async def _listen(self, requests: Any, attachment: Attachment) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "submit":
                submit = message.submit
                self.submits.append(submit)
                if not self.silent:
                    attachment.tasks[submit.handle] = asyncio.create_task(
                        self._answer(submit, attachment)
                    )
            elif kind == "cancel":
                self.cancels.append(message.cancel)
                if task := attachment.tasks.get(message.cancel.handle):
                    task.cancel()
            await self._note()

    async def _answer(self, submit: engine_pb2.Submit, attachment: Attachment) -> None:
        reply = self.script(submit)
        params = SamplingParams.from_proto(submit.sampling_params)
        limit = params.max_tokens if params.max_tokens is not None else len(reply.token_ids)
        tokens = list(reply.token_ids)[:limit]
        cut = len(reply.token_ids) > limit
        finish = reply.finish_reason or (LENGTH if cut else STOP)
        place = len(unpack_i32(submit.output_token_ids))
        common = {
            "handle": submit.handle, "attempt": submit.attempt,
            "num_cached_tokens": reply.num_cached_tokens, "deaths": submit.deaths,
        }  # fmt: skip
        await asyncio.sleep(reply.first_delay)
        while place < len(tokens):
            some = tokens[place : place + reply.chunk]
            last = place + len(some) >= len(tokens) and not reply.error and not reply.hang
            attachment.send(
                Row(
                    first_index=place, token_ids=some, logprobs=params.logprobs,
                    finish_reason=finish if last else 0,
                    stop_token_id=reply.stop_token_id if last and finish == STOP else -1,
                    **common,
                )
            )  # fmt: skip
            place += len(some)
            if last:
                return
            await asyncio.sleep(reply.delay)
        if reply.error:
            attachment.send(
                Row(first_index=place, finish_reason=ERROR, error=reply.error, **common)
            )
        elif not reply.hang:
            attachment.send(Row(first_index=place, finish_reason=finish, **common))
