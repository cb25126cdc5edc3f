"""Request: one prompt and what became of it, as token ids.

Knows no text, no tensors and no worker. While it has a slot its counts live in the columns; the
properties here read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quire.sampling import SamplingParams
from quire.telemetry import NO_CONTEXT, Context, Span
from quire.v1 import common_pb2, step_pb2
from quire_scheduler.columns import I32, Columns
from quire_scheduler.kv import Namespace

if TYPE_CHECKING:
    from quire_scheduler.outputs import Client

NO_TOKENS: I32 = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """What a client hands in. `output_token_ids` were delivered already (a resubmission): they
    are forced, and max_tokens, min_tokens and penalties count from the prompt's end."""

    handle: int  # the client's number for it, u32
    prompt_token_ids: I32  # [num_prompt_tokens]
    params: SamplingParams  # a missing seed is drawn here
    attempt: int = 0
    request_id: str = ""
    output_token_ids: I32 = field(default_factory=lambda: NO_TOKENS)  # [num_delivered]
    kind: int = common_pb2.REQUEST_KIND_GENERATE
    priority: int = 0  # lower runs first, under the priority policy
    adapter: str = ""
    cache_salt: str = ""
    tenant: str = ""
    deaths: int = 0
    grammar: common_pb2.Grammar | None = None
    trace: Context = NO_CONTEXT
    multimodal: bytes = b""
    num_more: int = 0  # submissions that follow at once and belong together: all or none


@dataclass(eq=False, slots=True)
class Request:
    """A submission that was accepted. `tokens` is the truth while it has no slot."""

    request_id: str
    owner: Client
    client: int  # number of the owner
    handle: int
    attempt: int
    params: SamplingParams
    namespace: Namespace
    arrival: int  # order of acceptance
    arrived_at: float  # clock, seconds
    num_prompt_tokens: int
    max_total: int  # tokens at which it ends by length
    tokens: I32  # [num_tokens] prompt and outputs, without a slot
    kind: int = common_pb2.REQUEST_KIND_GENERATE
    priority: int = 0
    deaths: int = 0  # since it last made progress, see Probation.blame
    blamed_at: int = 0  # num_tokens at the last one
    grammar: common_pb2.Grammar | None = None
    span: Span = field(default_factory=lambda: Span(NO_CONTEXT))
    num_cached_tokens: int = -1  # prompt tokens hit at first admission; -1 = not admitted yet
    num_preemptions: int = 0
    num_hit: int = 0  # tokens it found cached when it got its slot
    num_reached: int = 0  # tokens of it that were computed, in any slot before this one
    resumed: bool = False  # it ran before: goes to the front
    finished: bool = False
    num_final_tokens: int = 0
    slot: int = -1
    columns: Columns | None = None

    @property
    def pools(self) -> bool:
        """Whether it wants a vector instead of tokens."""
        return self.kind == common_pb2.REQUEST_KIND_POOL

    @property
    def num_tokens(self) -> int:
        if self.columns is not None:
            return int(self.columns.num_tokens[self.slot])
        return self.num_final_tokens or len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_computed_tokens(self) -> int:
        return int(self.columns.num_computed_tokens[self.slot]) if self.columns is not None else 0

    @property
    def row_flags(self) -> int:
        """RowFlag bits of the row that yields something."""
        flags = int(step_pb2.ROW_FLAG_SAMPLE)
        if self.pools:
            return flags | int(step_pb2.ROW_FLAG_POOL)
        if self.params.logprobs is not None:
            flags |= int(step_pb2.ROW_FLAG_LOGPROBS)
        return flags

    def admit(self, slot: int, num_computed: int, block_ids: I32, now: float) -> step_pb2.Admit:
        """The wire form of its admission to a slot."""
        waited = max(now - self.arrived_at, 0.0)
        prompt = self.num_prompt_tokens
        tokens = self.columns.token_ids[slot, : self.num_tokens] if self.columns else self.tokens
        return step_pb2.Admit(
            slot=slot,
            request_id=self.request_id,
            kind=self.kind,  # type: ignore[arg-type]
            prompt_token_ids=tokens[:prompt].astype("<i4").tobytes(),
            output_token_ids=tokens[prompt:].astype("<i4").tobytes(),
            num_computed_tokens=num_computed,
            block_ids=block_ids.astype("<i4").tobytes(),
            sampling_params=self.params.to_proto(),
            grammar=self.grammar,
            trace=trace_context(self.span.context),
            waited_micros=int(waited * 1e6),
        )


def trace_context(context: Context) -> common_pb2.TraceContext | None:
    """The wire form of a trace context; None when there is none."""
    if not context[0]:
        return None
    return common_pb2.TraceContext(traceparent=context[0], tracestate=context[1])
