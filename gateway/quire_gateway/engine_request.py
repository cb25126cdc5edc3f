"""OpenRequest: one sequence the engine is working on, as the gateway sees it.

Holds what a resubmission needs (prompt, delivered tokens, deaths) and what the consumer has
not taken yet. Knows no gRPC call; engine_client.py moves the messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.errors import QuireError
from quire.v1 import common_pb2, engine_pb2
from quire.wire import pack_i32
from quire_gateway.logprobs import TokenLogprobs

FinishReason = common_pb2.FinishReason


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked of the engine. sampling_params has its seed."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: common_pb2.SamplingParams
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    trace: tuple[str, str] = ("", "")  # traceparent, tracestate
    num_together: int = 1  # sequences of the client's request: all are taken, or none
    num_more: int = 0  # of them, those that follow this one


@dataclass(slots=True)
class Delta:
    """Output that is new since the last take(). arrivals: for each message of the engine, the
    loop's clock (s) and its number of tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    finish_reason: int = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_token_id: int | None = None


class OpenRequest:
    """Written by the EngineClient, read by one consumer, both on the same event loop. `bell`
    is set whenever there is something to take; several requests may share one."""

    def __init__(self, handle: int, submission: Submission, bell: asyncio.Event) -> None:
        self.handle = handle
        self.submission = submission
        self.attempt = 0
        self.deaths = 0
        self.num_cached_tokens: int | None = None  # of the first admission
        self.delivered: list[int] = []  # every output token so far
        self.opened = asyncio.get_running_loop().time()
        self.done = False
        self._bell = bell
        self._delta = Delta()
        self._error: QuireError | None = None

    # -- the consumer's side
    def take(self) -> Delta | None:
        """What has arrived since the last call, or None. Raises the request's QuireError when
        it failed and everything before is taken."""
        delta = self._delta
        if delta.token_ids or delta.finish_reason:
            self._delta = Delta()
            return delta
        if self._error is not None:
            raise self._error
        return None

    # -- the client's side
    def submit(self) -> engine_pb2.Submit:
        """The Submit of the present attempt."""
        asked = self.submission
        return engine_pb2.Submit(
            handle=self.handle,
            attempt=self.attempt,
            request_id=asked.request_id,
            kind=common_pb2.REQUEST_KIND_GENERATE,
            prompt_token_ids=pack_i32(asked.prompt_token_ids),
            output_token_ids=pack_i32(self.delivered),
            sampling_params=asked.sampling_params,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            tenant=asked.tenant,
            deaths=self.deaths,
            num_more=asked.num_more,
            trace=common_pb2.TraceContext(traceparent=asked.trace[0], tracestate=asked.trace[1]),
        )

    def deliver(
        self,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        finish_reason: int,
        stop_token_id: int | None,
        now: float,
    ) -> bool:
        """Take a row of results in; tokens delivered before are dropped. False when tokens are
        missing between the row and what was delivered."""
        known = len(self.delivered) - first_index
        if known < 0:
            return False
        new = token_ids[known:]
        delta = self._delta
        if new:
            self.delivered.extend(new)
            delta.token_ids.extend(new)
            delta.logprobs.extend(logprobs[known:])
            delta.arrivals.append((now, len(new)))
        if finish_reason:
            delta.finish_reason = finish_reason
            delta.stop_token_id = stop_token_id
            self.done = True
        if new or finish_reason:
            self._bell.set()
        return True

    def fail(self, error: QuireError) -> None:
        """End it with an error, after what has already arrived."""
        self._error = error
        self.done = True
        self._bell.set()
