"""The border: a Submission is checked again and becomes a Request, an answer, or an error.

Knows no slot and no step. The gateway checked too, but a scheduler trusts nobody with its loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.errors import InvalidRequest, QuireError
from quire.telemetry import Tracer
from quire.v1 import common_pb2
from quire_scheduler.kv import Namespace
from quire_scheduler.outputs import LENGTH, STOP, Client, Outputs, one_row
from quire_scheduler.request import Request, Submission

MAX_HANDLE = (1 << 32) - 1
MAX_NAME_BYTES = 512  # of a request id, tenant or salt


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model as the workers described it; max_model_len fits the KV pool and the flag too."""

    model: str
    model_digest: str  # hex
    dtype: str
    kv_dtype: str
    block_size: int
    num_blocks: int  # usable ones
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_slots: int
    device: str
    attention_backend: str
    system_fingerprint: str


def accept(
    submission: Submission,
    owner: Client,
    client: int,
    model: ModelInfo,
    tracer: Tracer,
    *,
    arrival: int,
    now: float,
    use_priority: bool,
) -> Request | Outputs:
    """The request, or the finish alone when delivered tokens meet a finish condition already.
    Raises QuireError."""
    check(submission, model)
    params = submission.params.check(model.vocab_size).seeded()
    prompt, output = submission.prompt_token_ids, submission.output_token_ids
    max_total = model.max_model_len
    if submission.kind == common_pb2.REQUEST_KIND_POOL:
        max_total = len(prompt) + 1  # the vector takes the place of one token
    elif params.max_tokens is not None:
        max_total = min(max_total, len(prompt) + params.max_tokens)
    if len(output):
        last = int(output[-1])
        eos = () if params.ignore_eos else model.eos_token_ids
        if len(output) > params.min_tokens and (last in eos or last in params.stop_token_ids):
            return _finish(submission, STOP, last)
        if len(prompt) + len(output) >= max_total:
            return _finish(submission, LENGTH, -1)
    salt = b""
    if submission.tenant or submission.cache_salt:
        salt = f"{submission.tenant}\0{submission.cache_salt}".encode("utf-8", "surrogatepass")
    return Request(
        request_id=submission.request_id,
        owner=owner,
        client=client,
        handle=submission.handle,
        attempt=submission.attempt,
        params=params,
        namespace=Namespace(salt=salt),
        arrival=arrival,
        arrived_at=now,
        num_prompt_tokens=len(prompt),
        max_total=max_total,
        tokens=np.concatenate((prompt, output)).astype(np.int32, copy=False),
        kind=submission.kind or common_pb2.REQUEST_KIND_GENERATE,
        priority=submission.priority if use_priority else 0,
        deaths=submission.deaths,
        grammar=submission.grammar,
        span=tracer.span(
            "scheduler request",
            submission.trace,
            attributes={"quire.request_id": submission.request_id},
        ),
        resumed=submission.attempt > 0 or len(output) > 0,
        num_reached=len(prompt) + len(output) - 1 if len(output) else 0,
    )


def check(submission: Submission, model: ModelInfo) -> None:
    """Raise QuireError for what this scheduler and its worker can't do."""
    if not 0 <= submission.handle <= MAX_HANDLE or not 0 <= submission.attempt <= MAX_HANDLE:
        raise InvalidRequest("handle and attempt must be unsigned 32-bit numbers.")
    if submission.kind not in common_pb2.RequestKind.values():
        raise InvalidRequest(f"{submission.kind} is no kind of request.")
    if submission.adapter:
        raise QuireError("unsupported", "Adapters are not served by this version.", param="model")
    if submission.grammar is not None and submission.grammar.kind:
        raise QuireError(
            "unsupported",
            "Structured output is not served by this version.",
            param="response_format",
        )
    if submission.multimodal:
        raise QuireError("unsupported", "Only text is served.", param="messages")
    if submission.params.prompt_logprobs is not None:
        raise QuireError(
            "unsupported",
            "prompt_logprobs is not served by this version.",
            param="prompt_logprobs",
        )
    if submission.params.n != 1:
        raise InvalidRequest("n is the gateway's: submit each choice by itself.", "n")
    for name in ("request_id", "tenant", "cache_salt"):
        if len(getattr(submission, name)) > MAX_NAME_BYTES:
            raise InvalidRequest(f"{name} must not exceed {MAX_NAME_BYTES} characters.", name)
    if not -(1 << 31) <= submission.priority < 1 << 31:
        raise InvalidRequest("priority must be a 32-bit number.", "priority")
    prompt, output = submission.prompt_token_ids, submission.output_token_ids
    if not len(prompt):
        raise InvalidRequest("The prompt must hold at least one token.", "prompt")
    limit = model.max_model_len
    if len(prompt) >= limit:
        raise InvalidRequest(
            f"The prompt has {len(prompt)} tokens; with at least one output token it must stay "
            f"within the context of {limit} tokens. Shorten it.",
            "prompt",
            "context_length_exceeded",
        )
    if len(prompt) + len(output) > limit:
        raise InvalidRequest(
            f"{len(output)} delivered tokens do not fit the context of {limit} tokens.",
            "prompt",
            "context_length_exceeded",
        )
    for tokens in (prompt, output):
        if tokens.ndim != 1 or tokens.dtype != np.int32:
            raise InvalidRequest("Token ids must be one row of int32.", "prompt")
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < model.vocab_size):
            bad = int(tokens[(tokens < 0) | (tokens >= model.vocab_size)][0])
            raise InvalidRequest(
                f"Token id {bad} is not in the vocabulary of {model.vocab_size} tokens.", "prompt"
            )


def _finish(submission: Submission, reason: int, stop_token_id: int) -> Outputs:
    return one_row(
        submission.handle,
        submission.attempt,
        len(submission.output_token_ids),
        reason,
        stop_token_id=stop_token_id,
        deaths=submission.deaths,
    )
