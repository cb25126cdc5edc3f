"""What the Python API returns; field names are vLLM's. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate of one position. rank: 1 = the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `text` and `token_ids` are all of it so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # [num_output_tokens]
    finish_reason: str | None = None  # "stop" | "length" | "abort"
    stop_reason: int | str | None = None  # the token id or string that stopped it

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A pooled vector. embedding: [hidden_size]."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One prompt and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts at the moment of the call; preemptions and requests since start."""

    running_sequences: int
    waiting_sequences: int
    num_preemptions: int
    num_requests: int

    def preemption_rate(self) -> float:
        """Preemptions per admitted request."""
        return self.num_preemptions / self.num_requests if self.num_requests else 0.0


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """KV blocks; utilization is the share that running requests hold, 0..1."""

    num_blocks_total: int
    num_blocks_used: int
    num_blocks_cached: int

    @property
    def utilization(self) -> float:
        return self.num_blocks_used / self.num_blocks_total if self.num_blocks_total else 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What get_stats() returns."""

    scheduler: SchedulerStats
    memory: MemoryStats
    cache_hit_rate: float  # prompt tokens found in the prefix cache, 0..1


@dataclass(frozen=True, slots=True)
class Health:
    """What health_check() returns."""

    is_healthy: bool
    problem: str = ""
