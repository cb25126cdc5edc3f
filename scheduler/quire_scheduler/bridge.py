"""The two crossings between gRPC's event loop and the engine thread, and the wire's forms.

OutputStream brings outputs from the engine to a coroutine without ever making the engine wait;
the functions below turn gRPC messages into Submissions, and books into messages. Knows no server
and no engine.
"""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np

from quire.errors import InvalidRequest
from quire.sampling import SamplingParams
from quire.telemetry import NO_CONTEXT, Context
from quire.v1 import common_pb2, engine_pb2
from quire_scheduler.columns import I32
from quire_scheduler.kv import BlockInfo
from quire_scheduler.outputs import Outputs, merge
from quire_scheduler.request import Submission

MAX_MERGED_TOKENS = 1 << 18  # in one message to a client that reads slowly


class OutputStream:
    """A Client whose outputs are awaited on an event loop. What piles up while nobody awaits
    comes as one delivery."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parts: deque[Outputs] = deque()
        self._ready = asyncio.Event()
        self._rung = False
        self._closed = False

    def deliver(self, outputs: Outputs) -> None:
        """From any thread; never waits."""
        if self._closed:
            return
        self._parts.append(outputs)
        if not self._rung:
            self._rung = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop is closed
                self._closed = True

    def close(self) -> None:
        """Nobody will await any more."""
        self._closed = True
        self._parts.clear()

    async def next(self) -> Outputs:
        """All that has come since the last call, as one; waits for the first."""
        while not self._parts:
            await self._ready.wait()
            self._ready.clear()
            self._rung = False  # before looking: what comes later rings again
        parts = [self._parts.popleft()]
        size = len(parts[0].token_ids)
        while self._parts and size < MAX_MERGED_TOKENS:
            parts.append(self._parts.popleft())
            size += len(parts[-1].token_ids)
        return merge(parts)


def from_submit(message: engine_pb2.Submit) -> Submission:
    """Raises InvalidRequest for columns that can't be right; values are checked later."""
    trace = NO_CONTEXT
    if message.HasField("trace"):
        trace = (message.trace.traceparent, message.trace.tracestate)
    return Submission(
        handle=message.handle,
        attempt=message.attempt,
        request_id=message.request_id,
        kind=message.kind,
        prompt_token_ids=_column(message.prompt_token_ids, "prompt"),
        output_token_ids=_column(message.output_token_ids, "output_token_ids"),
        params=SamplingParams.from_proto(message.sampling_params),
        priority=message.priority,
        adapter=message.adapter,
        cache_salt=message.cache_salt,
        tenant=message.tenant,
        deaths=message.deaths,
        grammar=message.grammar if message.HasField("grammar") else None,
        trace=trace,
        multimodal=message.multimodal,
        num_more=message.num_more,
    )


def from_generate(
    message: engine_pb2.GenerateRequest, request_id: str, trace: Context
) -> Submission:
    """The submission of a call of its own: handle 0."""
    return Submission(
        handle=0,
        request_id=request_id,
        prompt_token_ids=np.array(message.prompt_token_ids, np.int32),
        params=SamplingParams.from_proto(message.sampling_params),
        priority=message.priority,
        adapter=message.adapter,
        cache_salt=message.cache_salt,
        trace=trace,
    )


def from_embed(message: engine_pb2.EmbedRequest, request_id: str, trace: Context) -> Submission:
    """The submission of an Embed call: handle 0."""
    return Submission(
        handle=0,
        request_id=request_id,
        kind=common_pb2.REQUEST_KIND_POOL,
        prompt_token_ids=np.array(message.prompt_token_ids, np.int32),
        params=SamplingParams(),
        trace=trace,
    )


def to_description(info: BlockInfo) -> engine_pb2.BlockDescription:
    return engine_pb2.BlockDescription(
        block_id=info.block_id,
        state=info.state,
        tier=info.tier,
        owners=info.owners,
        num_holders=info.num_holders,
        age_s=info.age_s,
        hits=info.hits,
        name=info.name or b"",
    )


def _column(data: bytes, name: str) -> I32:
    if len(data) % 4:
        raise InvalidRequest(f"{len(data)} bytes are no column of int32.", name)
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
