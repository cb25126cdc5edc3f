"""EngineService over grpc.aio: the scheduler's front.

Knows gRPC and the engine's public face; no blocks, no plans, no workers. Errors become statuses
here, by the error table, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.config import EngineConfig
from quire.errors import AddressInUse, ConfigError, InvalidRequest, QuireError
from quire.telemetry import NO_CONTEXT, Context
from quire.v1 import engine_pb2, engine_pb2_grpc
from quire.wire import PROTOCOL_VERSION
from quire_scheduler.bridge import (
    OutputStream,
    from_embed,
    from_generate,
    from_submit,
    to_description,
)
from quire_scheduler.engine import Engine
from quire_scheduler.metrics import MetricsPage, resident_bytes
from quire_scheduler.outputs import ERROR, one_row

log = logging.getLogger("quire.scheduler")

SERVICE = "quire.v1.EngineService"
HEALTH_POLL_S = 0.1
HELLO_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 256 << 20
MAX_BLOCKS, FEW_BLOCKS = 256, 32  # in one description
TIERS = ("device", "host")
OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a second server on the port is accepted silently
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A stream may be silent for long; pings are how both ends know that the other lives. The
    # gateway pings every 5 s, and no number of pings is abuse.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
]


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """One instance per engine; all state is the engine's."""

    def __init__(self, engine: Engine, config: EngineConfig, page: MetricsPage) -> None:
        self._engine, self._config, self._page = engine, config, page

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        engine = self._engine
        request_id = request.request_id or f"gen-{secrets.token_hex(8)}"
        stream = OutputStream(asyncio.get_running_loop())
        try:
            self._require(request.model)
            engine.submit(stream, from_generate(request, request_id, _trace(context)))
            count = 0
            while True:
                outputs = await stream.next()
                count += len(outputs.token_ids)
                for failed in outputs.failures:
                    raise failed.error
                reason = int(outputs.finish_reasons[-1])
                answer = engine_pb2.GenerateResponse(
                    request_id=request_id,
                    token_ids=outputs.token_ids.tolist(),
                    finish_reason=reason,  # type: ignore[arg-type]
                    logprobs=outputs.logprobs.to_proto() if outputs.logprobs else None,
                )
                if reason:
                    answer.usage.num_prompt_tokens = len(request.prompt_token_ids)
                    answer.usage.num_output_tokens = count
                    answer.usage.num_cached_tokens = int(outputs.num_cached_tokens[-1])
                    if outputs.stop_token_ids[-1] >= 0:
                        answer.stop_token_id = int(outputs.stop_token_ids[-1])
                yield answer
                if reason:
                    return
        except QuireError as error:
            await abort(context, error)
        finally:
            stream.close()
            engine.detach(stream)  # cancels it, when the caller has gone or its deadline passed

    async def Attach(self, requests: AsyncIterator[engine_pb2.AttachRequest], context: Any) -> None:
        engine = self._engine
        stream = OutputStream(asyncio.get_running_loop())
        try:
            await self._greet(requests, context)
            reader = asyncio.create_task(self._read(requests, stream), name="attach-read")
            try:
                await self._write(stream, context, reader)
            finally:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await reader
        except QuireError as error:
            await abort(context, error)
        finally:
            stream.close()
            engine.detach(stream)

    async def _greet(self, requests: AsyncIterator[engine_pb2.AttachRequest], context: Any) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(requests)
        except (StopAsyncIteration, TimeoutError):
            raise QuireError("invalid_request", "The stream must begin with a hello.") from None
        if first.WhichOneof("message") != "hello":
            raise QuireError("invalid_request", "The stream must begin with a hello.")
        if first.hello.protocol_version != PROTOCOL_VERSION:
            raise QuireError(
                "config_error",
                f"The gateway speaks protocol {first.hello.protocol_version}, the scheduler "
                f"{PROTOCOL_VERSION}: install the same version of quire for both.",
            )
        log.info("gateway %s attached", first.hello.gateway_id[:64])
        welcome = engine_pb2.AttachWelcome(
            scheduler_epoch=self._engine.stats().epoch, protocol_version=PROTOCOL_VERSION
        )
        await context.write(engine_pb2.AttachResponse(welcome=welcome))

    async def _read(
        self, requests: AsyncIterator[engine_pb2.AttachRequest], stream: OutputStream
    ) -> None:
        """Until the gateway closes its side."""
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "submit":
                submit = message.submit
                try:
                    submission = from_submit(submit)
                except QuireError as error:
                    row = one_row(submit.handle, submit.attempt, 0, ERROR, error=error)
                    stream.deliver(row)
                    continue
                self._engine.submit(stream, submission)
            elif kind == "cancel":
                self._engine.cancel(stream, message.cancel.handle, message.cancel.attempt)
            else:
                raise QuireError("invalid_request", "An AttachRequest was empty or a second hello.")

    async def _write(self, stream: OutputStream, context: Any, reader: asyncio.Task[None]) -> None:
        """Outputs down until the reader ends."""
        while True:
            outputs = asyncio.create_task(stream.next(), name="attach-outputs")
            try:
                await asyncio.wait((outputs, reader), return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()
                    return
                await context.write(outputs.result().to_proto())
            finally:
                outputs.cancel()

    async def GetModel(
        self, request: engine_pb2.GetModelRequest, context: Any
    ) -> engine_pb2.GetModelResponse:
        model, stats = self._engine.model(), self._engine.stats()
        if model is None:
            return engine_pb2.GetModelResponse(
                model=self._config.model, ready=False, status=stats.problem
            )
        return engine_pb2.GetModelResponse(
            model=model.model,
            model_digest=model.model_digest,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            dtype=model.dtype,
            block_size=model.block_size,
            num_blocks=model.num_blocks,
            system_fingerprint=model.system_fingerprint,
            ready=stats.ready,
            status=stats.problem,
            device=model.device,
        )

    async def GetLoad(
        self, request: engine_pb2.GetLoadRequest, context: Any
    ) -> engine_pb2.GetLoadResponse:
        stats = self._engine.stats()
        pages = [engine_pb2.MetricsText(service="scheduler", text=self._page.page())]
        pages += [
            engine_pb2.MetricsText(service=f"worker-{rank}", text=text)
            for rank, text in stats.worker_metrics
        ]
        return engine_pb2.GetLoadResponse(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_blocks_total=stats.num_blocks_total,
            num_blocks_used=stats.num_blocks_used,
            num_blocks_cached=stats.num_blocks_cached,
            prefix_query_tokens=stats.prefix_query_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            num_preemptions=stats.num_preemptions,
            num_requests=stats.num_requests,
            memory_bytes=resident_bytes() + stats.worker_memory_bytes,
            metrics=pages,
            healthy=stats.healthy,
            problem=stats.problem,
            draining=stats.draining,
        )

    async def Drain(
        self, request: engine_pb2.DrainRequest, context: Any
    ) -> engine_pb2.DrainResponse:
        timeout = request.timeout_s
        if not 0 <= timeout <= 86400:
            error = QuireError("invalid_request", "timeout_s must be between 0 and 86400.")
            await abort(context, error)
        left = await asyncio.to_thread(self._engine.drain, timeout)
        return engine_pb2.DrainResponse(num_unfinished=left)

    async def DescribeBlocks(
        self, request: engine_pb2.DescribeBlocksRequest, context: Any
    ) -> engine_pb2.DescribeBlocksResponse:
        try:
            if len(request.block_ids) > MAX_BLOCKS or request.limit > MAX_BLOCKS:
                raise InvalidRequest(f"At most {MAX_BLOCKS} blocks are described at once.")
            tier = request.tier or "device"
            if tier not in TIERS:
                raise InvalidRequest(f"tier must be one of {', '.join(TIERS)}.", "tier")
            found = await asyncio.to_thread(
                self._engine.describe_blocks,
                list(request.block_ids),
                request.limit or FEW_BLOCKS,
                tier,
            )
        except QuireError as error:
            await abort(context, error)
        stats, model = self._engine.stats(), self._engine.model()
        used, cached = stats.num_blocks_used, stats.num_blocks_cached
        return engine_pb2.DescribeBlocksResponse(
            num_blocks=stats.num_blocks_total,
            num_used=used,
            num_cached=cached,
            num_free=stats.num_blocks_total - used - cached,
            block_size=model.block_size if model else 0,
            blocks=[to_description(info) for info in found],
        )

    async def Embed(
        self, request: engine_pb2.EmbedRequest, context: Any
    ) -> engine_pb2.EmbedResponse:
        engine = self._engine
        request_id = request.request_id or f"emb-{secrets.token_hex(8)}"
        stream = OutputStream(asyncio.get_running_loop())
        try:
            self._require(request.model)
            engine.submit(stream, from_embed(request, request_id, _trace(context)))
            outputs = await stream.next()
            for failed in outputs.failures:
                raise failed.error
            answer = engine_pb2.EmbedResponse(
                embedding=outputs.pooled[0].embedding.astype("<f4").tobytes()
            )
            answer.usage.num_prompt_tokens = len(request.prompt_token_ids)
            answer.usage.num_cached_tokens = int(outputs.num_cached_tokens[0])
            return answer
        except QuireError as error:
            await abort(context, error)
        finally:
            stream.close()
            engine.detach(stream)

    def _require(self, model: str) -> None:
        """Raise QuireError unless `model` ("" = any) is served and loaded."""
        names = self._config.model_names
        if model and model not in names:
            message = f"The model {model[:200]!r} does not exist; served is {names[0]!r}."
            raise QuireError("model_not_found", message, param="model")
        if self._engine.model() is None:
            raise QuireError("not_ready", "The model is loading.", retry_after_s=1.0)

    async def LoadAdapter(self, request: Any, context: Any) -> Any:
        await abort(context, QuireError("unsupported", "Adapters are not served by this version."))

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:
        await abort(context, QuireError("unsupported", "Adapters are not served by this version."))


async def abort(context: Any, error: QuireError) -> NoReturn:
    """End the call with the error's status; trailing metadata say its name and when to retry."""
    trailing = [("quire-error", error.name)]
    if error.param:
        trailing.append(("quire-error-param", error.param))
    if error.kind.retry:
        trailing.append(("retry-after-ms", str(math.ceil((error.retry_after_s or 1.0) * 1000))))
    code = getattr(grpc.StatusCode, error.kind.grpc)
    await context.abort(code, error.message, trailing_metadata=tuple(trailing))
    raise AssertionError("abort() returned")


def _trace(context: Any) -> Context:
    found = {key: value for key, value in context.invocation_metadata() or () if key[:5] == "trace"}
    if not found.get("traceparent"):
        return NO_CONTEXT
    return (str(found["traceparent"]), str(found.get("tracestate", "")))


class Server:
    """The gRPC server with health and reflection. start(), then stop()."""

    def __init__(self, engine: Engine, config: EngineConfig, page: MetricsPage) -> None:
        self._engine = engine
        self._server = grpc.aio.server(options=OPTIONS)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(  # type: ignore[no-untyped-call]
            EngineServicer(engine, config, page), self._server
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, address: str) -> int:
        """Listen; returns the port. Raises AddressInUse or ConfigError."""
        taken = AddressInUse(
            f"{address} (--engine-address) is taken, perhaps by another scheduler. Stop it or "
            "choose another port."
        )
        if await _answers(address):  # asked first: gRPC would write a line of its own to stderr
            raise taken
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            if "in use" in str(error):
                raise taken from None
            raise ConfigError(f"--engine-address {address}: {error}.") from None
        if not port:
            raise ConfigError(f"--engine-address {address}: it can't be bound.")
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch(), name="health")
        return int(port)

    async def stop(self, grace: float) -> None:
        """Answer NOT_SERVING, then end all calls after so many seconds."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def _watch(self) -> None:
        """Health follows the engine."""
        last = None
        while True:
            stats = self._engine.stats()
            good = stats.healthy and not stats.draining
            if good != last:
                last = good
                status = health_pb2.HealthCheckResponse
                now = status.SERVING if good else status.NOT_SERVING
                await self._health.set("", now)
                await self._health.set(SERVICE, now)
            await asyncio.sleep(HEALTH_POLL_S)


async def _answers(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = address.rpartition(":")
    if port == "0":
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), 1)
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True
