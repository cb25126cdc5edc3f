"""EngineClient: the gateway's one stream to the scheduler, and what survives its loss.

Sends submits and cancels, hands columnar results to the requests they belong to. When the
stream is lost it connects again and resubmits every open request with what was delivered.
Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from typing import Any

import grpc
import grpc.aio

from quire.errors import KINDS, QuireError
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc
from quire.wire import PROTOCOL_VERSION
from quire_gateway.engine_request import OpenRequest, Submission
from quire_gateway.engine_rows import Rows
from quire_gateway.room import Room

log = logging.getLogger(__name__)

FIRST_BACKOFF, LAST_BACKOFF = 0.05, 0.2  # s; a refused connection on one machine costs little
WELCOME_TIMEOUT = 5.0
UNARY_TIMEOUT = 2.0
ANSWER_GRACE = 2.0
PROBE_TIMEOUT = 0.8  # below the second that probes usually allow
POLL_INTERVAL = 0.05
# A silent stream is normal (a long prefill), so pings find a dead peer; the server is told
# not to count them as abuse by the same three settings on its side.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class StreamLost(Exception):
    """The Attach stream ended or broke its contract."""


class EngineClient:
    """State, all of it touched only on the event loop: `_open` (handle -> request), `_outbox`
    (messages not yet written), `model` (the last ready GetModel answer)."""

    def __init__(self, address: str, reconnect_timeout: float = 30.0) -> None:
        self.address = address
        self.model: engine_pb2.GetModelResponse | None = None
        self.status = f"connecting to the scheduler at {address}"  # while not connected
        self.connected = False
        self.room = Room()
        self._reconnect_timeout = reconnect_timeout
        self._gateway_id = secrets.token_hex(8)
        self._handles = itertools.count(1)
        self._open: dict[int, OpenRequest] = {}
        self._outbox: deque[engine_pb2.AttachRequest] = deque()
        self._outbox_bell = asyncio.Event()
        self._lost_at = 0.0
        self._load: engine_pb2.GetLoadResponse | None = None  # the last answer
        self._load_at = 0.0
        self._channel: Any = None
        self._stub: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    # -- life
    async def start(self) -> None:
        """Begin to connect; returns at once."""
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._lost_at = asyncio.get_running_loop().time()
        self._tasks = [
            asyncio.create_task(self._run(), name="engine-stream"),
            asyncio.create_task(self._expire(), name="engine-expiry"),
        ]

    async def close(self) -> None:
        """End the stream; open requests fail."""
        self.fail_all(QuireError("draining", "The server is shutting down."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    # -- requests
    @property
    def num_open(self) -> int:
        """Sequences submitted and not finished."""
        return len(self._open)

    def submit(self, submission: Submission, bell: asyncio.Event) -> OpenRequest:
        """Ask the engine for one sequence. While the scheduler is away the request waits; it
        fails with 'scheduler_unavailable' after the reconnect timeout."""
        request = OpenRequest(next(self._handles), submission, bell)
        self._open[request.handle] = request
        self.room.taken()
        if self.connected:
            self._send(engine_pb2.AttachRequest(submit=request.submit()))
        return request

    def cancel(self, request: OpenRequest) -> None:
        """Stop it; nothing more arrives. Harmless when it is done."""
        if self._open.pop(request.handle, None) is not None and self.connected:
            cancel = engine_pb2.Cancel(handle=request.handle, attempt=request.attempt)
            self._send(engine_pb2.AttachRequest(cancel=cancel))
            self.room.freed(asyncio.get_running_loop().time())
        request.done = True

    def fail_all(self, error: QuireError) -> None:
        """End every open request with this error."""
        for request in list(self._open.values()):
            self.cancel(request)
            request.fail(error)

    # -- questions
    async def get_load(self) -> engine_pb2.GetLoadResponse | None:
        """Ask now; None when the scheduler does not answer."""
        answer: engine_pb2.GetLoadResponse | None
        answer = await self._ask(self._stub.GetLoad, engine_pb2.GetLoadRequest())
        if answer is not None:
            self._load, self._load_at = answer, asyncio.get_running_loop().time()
        return answer

    async def recent_load(self) -> engine_pb2.GetLoadResponse | None:
        """Ask now, and take an answer of the last ANSWER_GRACE instead of none: on a busy machine
        one question may come to nothing."""
        answer = await self.get_load()
        since = asyncio.get_running_loop().time() - self._load_at
        return answer or (self._load if since < ANSWER_GRACE else None)

    async def _ask(self, method: Any, message: Any) -> Any:
        try:
            return await method(message, timeout=PROBE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            log.debug("scheduler does not answer: %s", error.code().name)
            return None

    # -- the stream
    async def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            reason = ""
            try:
                await self._session()
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except (StreamLost, TimeoutError, ValueError, asyncio.InvalidStateError) as error:
                reason = str(error) or type(error).__name__
            except Exception as error:  # this loop must outlive whatever happens in it
                log.exception("the engine stream failed")
                reason = type(error).__name__
            if self.connected:
                self._disconnected(reason)
                backoff = FIRST_BACKOFF
            else:
                log.debug("scheduler at %s: %s", self.address, reason)
            await asyncio.sleep(backoff * (0.75 + secrets.randbelow(512) / 1024))
            backoff = min(2 * backoff, LAST_BACKOFF)

    async def _session(self) -> None:
        """One Attach stream from hello to loss. Leaves by an exception, always."""
        call = self._stub.Attach()
        try:
            hello = engine_pb2.AttachHello(
                gateway_id=self._gateway_id, protocol_version=PROTOCOL_VERSION
            )
            async with asyncio.timeout(WELCOME_TIMEOUT):
                await call.write(engine_pb2.AttachRequest(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF or not first.HasField("welcome"):
                raise StreamLost("the scheduler did not welcome this gateway")
            if first.welcome.protocol_version != PROTOCOL_VERSION:
                raise StreamLost(
                    f"the scheduler speaks protocol {first.welcome.protocol_version}, "
                    f"this gateway {PROTOCOL_VERSION}; use the same version of both"
                )
            await self._await_model()
            self._attached()
            ends = [
                asyncio.create_task(self._read(call), name="engine-read"),
                asyncio.create_task(self._write(call), name="engine-write"),
            ]
            try:
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
                await asyncio.gather(*ends, return_exceptions=True)
            for end in done:
                if not end.cancelled():  # grpc cancels the reader of a call that was cancelled
                    end.result()
            raise StreamLost("the call was cancelled")
        finally:
            call.cancel()

    async def _await_model(self) -> None:
        """Wait until the engine is ready; refuse to go on with another model's tokens."""
        while True:
            model = await self._stub.GetModel(engine_pb2.GetModelRequest(), timeout=UNARY_TIMEOUT)
            if model.ready:
                break
            self.status = model.status or "the engine is loading"
            # It is there and will be ready: what waits has not been abandoned.
            self._lost_at = asyncio.get_running_loop().time()
            await asyncio.sleep(POLL_INTERVAL)
        old = self.model.model_digest if self.model else ""
        if old and model.model_digest and old != model.model_digest:
            self.fail_all(
                QuireError("worker_lost", "The model was replaced; send the request again.")
            )
        self.model = model

    def _attached(self) -> None:
        self.connected = True
        self.status = ""
        self._outbox.clear()
        for request in self._open.values():
            self._send(engine_pb2.AttachRequest(submit=request.submit()))
        log.info(
            "connected to the scheduler", extra={"address": self.address, "open": self.num_open}
        )

    def _disconnected(self, reason: str) -> None:
        self.connected = False
        self.status = f"the scheduler at {self.address} is away"
        self._lost_at = asyncio.get_running_loop().time()
        self._outbox.clear()
        self.room.forget()
        for request in self._open.values():
            request.attempt += 1
        log.warning("lost the scheduler: %s", reason, extra={"open": self.num_open})

    async def _expire(self) -> None:
        """Fail what has waited too long for the scheduler to come back."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(POLL_INTERVAL, self._reconnect_timeout or POLL_INTERVAL))
            if self.connected:
                continue
            latest = loop.time() - self._reconnect_timeout
            for request in list(self._open.values()):
                if max(request.opened, self._lost_at) <= latest:
                    del self._open[request.handle]
                    request.fail(
                        QuireError(
                            "scheduler_unavailable",
                            f"The scheduler has been away for {self._reconnect_timeout:g} s; "
                            "try again later.",
                            retry_after_s=5.0,
                        )
                    )

    def _send(self, message: engine_pb2.AttachRequest) -> None:
        self._outbox.append(message)
        self._outbox_bell.set()

    async def _write(self, call: Any) -> None:
        while True:
            while self._outbox:
                await call.write(self._outbox.popleft())
            self._outbox_bell.clear()
            await self._outbox_bell.wait()

    async def _read(self, call: Any) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                raise StreamLost("the scheduler closed the stream")
            self._dispatch(message, loop.time())

    def _dispatch(self, message: engine_pb2.AttachResponse, now: float) -> None:
        """Hand each row to its request. Rows of requests that are gone and of older attempts
        are dropped. Raises StreamLost or ValueError for what breaks the contract."""
        rows = Rows(message)
        failures = {(f.handle, f.attempt): f.error for f in message.failures}
        for k, handle in enumerate(rows.handles):
            token_ids, logprobs = rows.tokens(k)
            request = self._open.get(handle)
            if request is None or request.attempt != rows.attempts[k]:
                continue
            if request.num_cached_tokens is None:
                request.num_cached_tokens = rows.num_cached_tokens[k]
            request.deaths = rows.deaths[k]
            finish = rows.finish_reasons[k]
            failed = finish in (
                common_pb2.FINISH_REASON_ERROR, common_pb2.FINISH_REASON_ABORT
            )  # fmt: skip
            stop = rows.stop_token_ids[k]
            if not request.deliver(
                rows.first_indices[k], token_ids, logprobs, 0 if failed else finish,
                stop if stop >= 0 else None, now,
            ):  # fmt: skip
                raise StreamLost(f"tokens of request {request.submission.request_id} are missing")
            if failed:
                key = (handle, request.attempt)
                self._fail(request, _to_error(failures.pop(key, None), finish), now)
            elif finish:
                del self._open[handle]
                self.room.freed(now)
        for (handle, attempt), error in failures.items():  # refused before any row
            request = self._open.get(handle)
            if request is not None and request.attempt == attempt:
                self._fail(request, _to_error(error, common_pb2.FINISH_REASON_ERROR), now)

    def _fail(self, request: OpenRequest, error: QuireError, now: float) -> None:
        del self._open[request.handle]
        if error.name != "queue_full":
            self.room.freed(now)
        elif request.submission.num_together == 1:  # for several there may be less room than asked
            self.room.refused(now, error.retry_after_s or 1.0)
        request.fail(error)


def _to_error(error: common_pb2.Error | None, finish: int) -> QuireError:
    """The scheduler's error by its name; what it does not name is ours."""
    if error is None:
        if finish == common_pb2.FINISH_REASON_ABORT:
            return QuireError("cancelled", "The server cancelled the request.")
        return QuireError("internal_error", "The engine failed without a reason.")
    return QuireError(
        error.name if error.name in KINDS else "internal_error",
        error.message or "The engine failed.",
        param=error.param or None,
        retry_after_s=error.retry_after_s or None,
    )
