"""Outputs: what a step, or a refusal, has for one client, as columns.

Knows no request and no transport: numbers in, numbers out. One row per request that has
something to say; rows of one handle are in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quire.errors import QuireError
from quire.v1 import common_pb2, engine_pb2
from quire_scheduler.columns import I32

U32 = NDArray[np.uint32]

UNFINISHED = int(common_pb2.FINISH_REASON_UNSPECIFIED)
STOP = int(common_pb2.FINISH_REASON_STOP)
LENGTH = int(common_pb2.FINISH_REASON_LENGTH)
ERROR = int(common_pb2.FINISH_REASON_ERROR)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row with finish reason ERROR failed."""

    handle: int
    attempt: int
    error: QuireError


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """The vector of a request of kind POOL. embedding: f32 [hidden_size]."""

    handle: int
    attempt: int
    embedding: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Columns as in LogprobColumns: token t has counts[t] entries, the sampled token first."""

    counts: U32  # [num_tokens]
    token_ids: I32  # [sum(counts)]
    logprobs: NDArray[np.float32]  # [sum(counts)]
    ranks: U32  # [num_tokens]

    @staticmethod
    def from_proto(message: common_pb2.LogprobColumns, num_tokens: int) -> Logprobs:
        """Raises ValueError when the columns do not fit each other or num_tokens."""
        read = Logprobs(
            np.frombuffer(message.counts, "<u4"),
            np.frombuffer(message.token_ids, "<i4"),
            np.frombuffer(message.logprobs, "<f4"),
            np.frombuffer(message.ranks, "<u4"),
        )
        total = int(read.counts.sum())
        if len(read.counts) != num_tokens or len(read.ranks) != num_tokens:
            raise ValueError("logprob columns are not as long as the tokens")
        if len(read.token_ids) != total or len(read.logprobs) != total:
            raise ValueError("logprob columns are not as long as their counts")
        return read

    @staticmethod
    def none(num_tokens: int) -> Logprobs:
        """Of tokens for which nobody asked."""
        empty = np.zeros(num_tokens, np.uint32)
        return Logprobs(empty, np.zeros(0, np.int32), np.zeros(0, np.float32), empty)

    def take(self, tokens: NDArray[np.bool_]) -> Logprobs:
        """Those of the tokens [num_tokens] marked True."""
        entries = np.repeat(tokens, self.counts)
        return Logprobs(
            self.counts[tokens], self.token_ids[entries], self.logprobs[entries], self.ranks[tokens]
        )

    def to_proto(self) -> common_pb2.LogprobColumns:
        return common_pb2.LogprobColumns(
            counts=self.counts.astype("<u4").tobytes(),
            token_ids=self.token_ids.astype("<i4").tobytes(),
            logprobs=self.logprobs.astype("<f4").tobytes(),
            ranks=self.ranks.astype("<u4").tobytes(),
        )


@dataclass(slots=True, eq=False)
class Outputs:
    """One delivery. Columns are [num_rows] unless said otherwise."""

    handles: U32
    attempts: U32
    first_indices: U32  # output index of the row's first token, counted from the prompt's end
    num_tokens: U32
    token_ids: I32  # [sum(num_tokens)]
    finish_reasons: NDArray[np.uint8]
    stop_token_ids: I32  # -1 = none
    num_cached_tokens: U32
    deaths: U32
    logprobs: Logprobs | None = None  # over token_ids; None when no row asked
    failures: Sequence[Failure] = field(default=())
    pooled: Sequence[Pooled] = field(default=())  # of rows that finish with a vector

    def __len__(self) -> int:
        return len(self.handles)

    def to_proto(self) -> engine_pb2.AttachResponse:
        return engine_pb2.AttachResponse(
            handles=self.handles.astype("<u4").tobytes(),
            attempts=self.attempts.astype("<u4").tobytes(),
            first_indices=self.first_indices.astype("<u4").tobytes(),
            num_tokens=self.num_tokens.astype("<u4").tobytes(),
            token_ids=self.token_ids.astype("<i4").tobytes(),
            finish_reasons=self.finish_reasons.tobytes(),
            stop_token_ids=self.stop_token_ids.astype("<i4").tobytes(),
            num_cached_tokens=self.num_cached_tokens.astype("<u4").tobytes(),
            deaths=self.deaths.astype("<u4").tobytes(),
            logprobs=None if self.logprobs is None else self.logprobs.to_proto(),
            failures=[
                engine_pb2.Failure(
                    handle=f.handle, attempt=f.attempt, error=error_to_proto(f.error)
                )
                for f in self.failures
            ],
            pooled=[
                engine_pb2.Pooled(
                    handle=p.handle,
                    attempt=p.attempt,
                    embedding=p.embedding.astype("<f4").tobytes(),
                )
                for p in self.pooled
            ],
        )


class Client(Protocol):
    """Who gets outputs: a gateway's stream, one gRPC call, or the Python API."""

    def deliver(self, outputs: Outputs) -> None:
        """Take one delivery. Called on the engine thread; must not block or raise."""


def one_row(
    handle: int,
    attempt: int,
    first_index: int,
    reason: int,
    *,
    stop_token_id: int = -1,
    num_cached_tokens: int = 0,
    deaths: int = 0,
    error: QuireError | None = None,
    embedding: NDArray[np.float32] | None = None,
) -> Outputs:
    """A finish without tokens."""
    return Outputs(
        handles=np.array([handle], np.uint32),
        attempts=np.array([attempt], np.uint32),
        first_indices=np.array([first_index], np.uint32),
        num_tokens=np.zeros(1, np.uint32),
        token_ids=np.zeros(0, np.int32),
        finish_reasons=np.array([reason], np.uint8),
        stop_token_ids=np.array([stop_token_id], np.int32),
        num_cached_tokens=np.array([max(num_cached_tokens, 0)], np.uint32),
        deaths=np.array([deaths], np.uint32),
        failures=() if error is None else (Failure(handle, attempt, error),),
        pooled=() if embedding is None else (Pooled(handle, attempt, embedding),),
    )


def merge(parts: Sequence[Outputs]) -> Outputs:
    """Several deliveries as one, in order. For a client that reads slowly."""
    if len(parts) == 1:
        return parts[0]
    logprobs = None
    if any(p.logprobs is not None for p in parts):
        each = [p.logprobs or Logprobs.none(len(p.token_ids)) for p in parts]
        logprobs = Logprobs(
            np.concatenate([e.counts for e in each]),
            np.concatenate([e.token_ids for e in each]),
            np.concatenate([e.logprobs for e in each]),
            np.concatenate([e.ranks for e in each]),
        )
    return Outputs(
        handles=np.concatenate([p.handles for p in parts]),
        attempts=np.concatenate([p.attempts for p in parts]),
        first_indices=np.concatenate([p.first_indices for p in parts]),
        num_tokens=np.concatenate([p.num_tokens for p in parts]),
        token_ids=np.concatenate([p.token_ids for p in parts]),
        finish_reasons=np.concatenate([p.finish_reasons for p in parts]),
        stop_token_ids=np.concatenate([p.stop_token_ids for p in parts]),
        num_cached_tokens=np.concatenate([p.num_cached_tokens for p in parts]),
        deaths=np.concatenate([p.deaths for p in parts]),
        logprobs=logprobs,
        failures=[f for p in parts for f in p.failures],
        pooled=[v for p in parts for v in p.pooled],
    )


def error_to_proto(error: QuireError) -> common_pb2.Error:
    return common_pb2.Error(
        name=error.name,
        message=error.message,
        param=error.param or "",
        retry_after_s=error.retry_after_s or 0.0,
    )
