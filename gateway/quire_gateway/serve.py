"""Serving one generation request over HTTP, streamed or whole.

Chat and completions differ only in how the body is read and in the shape of the answer; both
are given here as an Endpoint. Knows no sampling and no tokens' text.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from quire.errors import QuireError
from quire.v1.common_pb2 import SamplingParams
from quire_gateway.choices import Choice, Generation, Update
from quire_gateway.engine_request import Submission
from quire_gateway.http import GATEWAY, RECORD, internal_error, read_body
from quire_gateway.openai.ask import Ask, Limits
from quire_gateway.openai.body import parse_json
from quire_gateway.openai.shapes import ChatShape, CompletionShape, Finished, Json, Shape, dumps
from quire_gateway.prompts import tokenise
from quire_gateway.record import RequestRecord
from quire_gateway.sse import EventStream
from quire_gateway.state import Gateway

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What tells one generating route from another."""

    operation: str  # as traces name it
    read: Callable[[dict[str, Any], Limits], Ask]
    shape: type[ChatShape] | type[CompletionShape]


def handler(endpoint: Endpoint) -> Callable[[web.Request], Any]:
    """The aiohttp handler of a generating route."""

    async def handle(request: web.Request) -> web.StreamResponse:
        gateway, record = request.app[GATEWAY], request[RECORD]
        record.is_generation = True
        gateway.enter()
        try:
            return await _serve(request, gateway, record, endpoint)
        finally:
            gateway.leave()

    return handle


async def _serve(
    request: web.Request, gateway: Gateway, record: RequestRecord, endpoint: Endpoint
) -> web.StreamResponse:
    body = parse_json(await read_body(request, gateway.config.max_body_bytes))
    text, model = gateway.ready_text()
    ask = endpoint.read(body, gateway.limits())
    prompts = await tokenise(ask, text, model.max_model_len, gateway.threads)
    record.span.set(
        gen_ai__operation__name=endpoint.operation,
        gen_ai__request__model=ask.model,
        gen_ai__request__stream=ask.stream,
    )
    template = Submission(
        record.internal_id, (), SamplingParams(), ask.priority, ask.cache_salt,
        record.tenant, record.span.context,
    )  # fmt: skip

    def on_tokens(arrival: float, count: int, choice: Choice) -> None:
        if record.first_token is None:
            record.first_token = arrival
            gateway.metrics.ttft.observe(max(arrival - record.started, 0.0))
        gateway.metrics.observe_tokens(arrival, count, choice.last_arrival)

    generation = Generation(gateway.engine, text.tokenizer, prompts, template, on_tokens)
    shape = endpoint.shape(text.tokenizer)
    head: Json = {
        "id": shape.id_prefix + secrets.token_hex(12),
        "object": shape.chunk_object if ask.stream else shape.object,
        "created": int(time.time()),
        "model": ask.model,
        "system_fingerprint": model.system_fingerprint or None,
    }
    try:
        if ask.stream:
            return await _stream(request, gateway, ask, generation, shape, head, record)
        return await _whole(ask, generation, shape, head)
    except QuireError as error:
        record.error = error.name
        raise
    finally:
        generation.close()
        _account(gateway, record, generation)


async def _whole(ask: Ask, generation: Generation, shape: Shape, head: Json) -> web.Response:
    parts: list[list[str]] = [[] for _ in generation.choices]
    finished = [Finished(choice.index, "") for choice in generation.choices]
    async for batch in generation.updates():
        for update in batch:
            parts[update.index].append(update.text)
            whole = finished[update.index]
            whole.logprobs.extend(update.logprobs)
            whole.finish_reason, whole.stop_reason = update.finish_reason, update.stop_reason
    for whole in finished:
        whole.text = "".join(parts[whole.index])
    with_logprobs = ask.params.logprobs is not None
    answer = {
        **head,
        "choices": [shape.whole(whole, with_logprobs) for whole in finished],
        "usage": generation.usage.to_json(),
    }
    return web.Response(body=dumps(answer).encode(), content_type="application/json")


async def _stream(
    request: web.Request,
    gateway: Gateway,
    ask: Ask,
    generation: Generation,
    shape: Shape,
    head: Json,
    record: RequestRecord,
) -> web.StreamResponse:
    """Events until the end. An engine that refuses at once still makes a plain error status,
    because the response opens with the first result (or the first silence)."""
    events = EventStream(request)
    chunks = _Chunks(ask, generation, shape, head)
    try:
        async for batch in generation.updates(gateway.config.keep_alive_interval):
            values = [] if events.is_open else chunks.start()
            if not events.is_open:
                await events.open()
            for update in batch:
                values += chunks.of(update)
            if values:
                await events.send(*values)
            elif not batch:
                await events.keep_alive()
        if ask.include_usage:
            await events.send(chunks.usage())
        await events.done()
    except ConnectionResetError:  # nobody reads; the generation is closed by the caller
        record.error = "cancelled"
    except QuireError as error:
        await _fail(events, record, error)
    except Exception:
        if not events.is_open:
            raise
        log.exception("a stream failed", extra={"request_id": record.request_id})
        await _fail(events, record, internal_error(record))
    finally:
        events.close()
    return events.response


async def _fail(events: EventStream, record: RequestRecord, error: QuireError) -> None:
    if not events.is_open:
        raise error
    record.error = error.name
    try:
        await events.fail(error)
    except ConnectionResetError:
        log.debug("the client left before the error reached it")


class _Chunks:
    """The chunks of one stream, as JSON text. What all have in common is encoded once."""

    def __init__(self, ask: Ask, generation: Generation, shape: Shape, head: Json) -> None:
        self._generation = generation
        self._shape = shape
        self._head = dumps(head)[:-1]
        self._with_logprobs = ask.params.logprobs is not None
        self._with_usage = ask.include_usage
        self._continuous = ask.continuous_usage

    def start(self) -> list[str]:
        """Before any text."""
        indices = [choice.index for choice in self._generation.choices]
        return [self._chunk(c) for i in indices if (c := self._shape.start(i)) is not None]

    def of(self, update: Update) -> list[str]:
        """Text, when there is some, and the end apart from it."""
        chunks = []
        if update.text or (self._with_logprobs and update.logprobs):
            logprobs = update.logprobs if self._with_logprobs else None
            delta = self._shape.delta(update.index, update.text, logprobs, update.offset)
            chunks.append(self._chunk(delta))
        if update.finish_reason:
            end = self._shape.end(update.index, update.finish_reason, update.stop_reason)
            chunks.append(self._chunk(end))
        return chunks

    def usage(self) -> str:
        """The chunk after the last one."""
        return f'{self._head},"choices":[],"usage":{dumps(self._generation.usage.to_json())}}}'

    def _chunk(self, choice: Json) -> str:
        usage = ""
        if self._with_usage:
            counts = self._generation.usage.to_json() if self._continuous else None
            usage = f',"usage":{dumps(counts)}'
        return f'{self._head},"choices":[{dumps(choice)}]{usage}}}'


def _account(gateway: Gateway, record: RequestRecord, generation: Generation) -> None:
    """Write down how the generation ended."""
    usage, metrics = generation.usage, gateway.metrics
    record.tokens, record.prompt_tokens = usage.completion_tokens, usage.prompt_tokens
    metrics.prompt_tokens.inc(usage.prompt_tokens)
    metrics.cached_tokens.inc(usage.cached_tokens)
    failed = "error" if record.error not in ("", "cancelled") else "abort"
    for choice in generation.choices:
        reason = choice.finish_reason or failed
        metrics.requests.labels(reason).inc()
        if record.finish_reason is None:
            record.finish_reason = reason
    record.span.set(
        gen_ai__usage__input_tokens=usage.prompt_tokens,
        gen_ai__usage__output_tokens=usage.completion_tokens,
        gen_ai__usage__cache_read__input_tokens=usage.cached_tokens,
    )
