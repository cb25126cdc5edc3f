"""What a StepResult does to the state: tokens are appended, requests end, outputs go to clients.

Knows no link and no clock. Work per row is numpy; Python objects are touched for requests that
end. A result that can't be right raises ResultError before anything has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.errors import KINDS, QuireError
from quire.v1 import step_pb2
from quire_scheduler.columns import I32, Bool, Slots
from quire_scheduler.group import MAX_SLOTS
from quire_scheduler.outputs import LENGTH, STOP, U32, Logprobs, Outputs, one_row
from quire_scheduler.plan import NO_SLOTS, Plan
from quire_scheduler.request import Request
from quire_scheduler.state import State

ONE_EACH: U32 = np.ones(MAX_SLOTS, np.uint32)  # one token a row; never written
NO_STOPS: I32 = np.full(MAX_SLOTS, -1, np.int32)
for _constant in (ONE_EACH, NO_STOPS):
    _constant.flags.writeable = False


_U32 = np.dtype(np.uint32)


class ResultError(ValueError):
    """A result that does not answer its plan."""


@dataclass(slots=True, eq=False)
class Applied:
    """What came of a result."""

    outputs: list[tuple[int, Outputs]] = field(default_factory=list)  # client number, delivery
    ended: list[tuple[Request, int]] = field(default_factory=list)  # with STOP or LENGTH
    failed: list[tuple[Request, QuireError]] = field(default_factory=list)
    num_tokens: int = 0
    doubtful: bool = False  # no token was taken: start a new epoch


@dataclass(slots=True, eq=False)
class _Rows:
    slots: Slots  # [num_tokens] that yielded a token; one at most
    token_ids: I32  # [num_tokens]
    stopped: Bool  # [num_tokens]
    silent: Slots  # [num_rows - num_tokens] that were to sample too
    logprobs: Logprobs | None  # over the tokens
    pooled: dict[int, NDArray[np.float32]]  # slot -> f32 [hidden_size]


def read(result: step_pb2.StepResult, plan: Plan, vocab_size: int) -> _Rows:
    """The columns, checked against the plan. Raises ResultError."""
    if plan.copies or result.kv_ops_done:
        if list(result.kv_ops_done) != [order.op_id for order in plan.copies]:
            raise ResultError("the copies of the result are not those of the plan")
    slots = plan.sampled
    num_rows = len(slots)
    counts, finished = result.num_outputs, result.finished
    try:
        if result.slots != slots.astype("<i4").tobytes():
            ordered = np.frombuffer(result.slots, "<i4").astype(np.intp)
            if not np.array_equal(np.sort(ordered), np.sort(slots)):
                raise ResultError("rows of the result are not those of the plan")
            slots = ordered
        tokens = np.frombuffer(result.token_ids, "<i4")
        logprobs = None
        if result.logprobs.counts:
            logprobs = Logprobs.from_proto(result.logprobs, len(tokens))
    except ResultError:
        raise
    except ValueError as error:
        raise ResultError(f"columns of the result: {error}") from None
    if len(counts) != num_rows or len(finished) != num_rows:
        raise ResultError("rows of the result are not those of the plan")
    stopped = np.frombuffer(finished, np.uint8) != 0
    silent = NO_SLOTS
    if counts != b"\1" * num_rows:
        has = np.frombuffer(counts, np.uint8) == 1
        if np.count_nonzero(has) != num_rows - counts.count(0):
            raise ResultError("a row of the result has more tokens than its plan asked for")
        slots, silent, stopped = slots[has], slots[~has], stopped[has]
    if len(tokens) != len(slots):
        raise ResultError("a row of the result has more tokens than its plan asked for")
    if np.count_nonzero(tokens.view(_U32) < vocab_size) != len(tokens):
        raise ResultError("a token of the result is not in the vocabulary")
    return _Rows(slots, tokens, stopped, silent, logprobs, _pooled(result, plan))


def _pooled(result: step_pb2.StepResult, plan: Plan) -> dict[int, NDArray[np.float32]]:
    """Vectors of the plan's POOL rows that did not fail, which come in the order of the rows."""
    pooling = plan.flags & step_pb2.ROW_FLAG_POOL
    if not np.count_nonzero(pooling) and not result.pooled:
        return {}
    failed = {row.slot for row in result.row_errors}
    slots = [slot for slot in plan.slots[pooling != 0].tolist() if slot not in failed]
    if len(result.pooled) % (4 * max(len(slots), 1)) or bool(slots) != bool(result.pooled):
        raise ResultError("pooled vectors of the result are not those of the plan")
    if not slots:
        return {}
    vectors = np.frombuffer(result.pooled, "<f4").reshape(len(slots), -1)
    return dict(zip(slots, vectors, strict=True))


def apply(state: State, plan: Plan, result: step_pb2.StepResult, vocab_size: int) -> Applied:
    """Acknowledge the plan and append its tokens. Raises ResultError, then nothing is changed.

    When a row did not run whose prompt blocks others may have shared within the step, their
    tokens are worth nothing: only the errors are taken, and the plan is not acknowledged.
    """
    rows = read(result, plan, vocab_size)
    columns = state.columns
    applied = Applied()
    errors = _errors(state, result) if result.row_errors else []
    applied.doubtful = bool(errors) and any(doubtful for *_, doubtful in errors)
    if applied.doubtful:
        _fail(state, errors, applied)
        return applied
    state.acknowledge(plan)

    slots, tokens, stopped, logprobs = rows.slots, rows.token_ids, rows.stopped, rows.logprobs
    alive = columns.attached[slots]
    if np.count_nonzero(alive) < len(slots):
        slots, tokens, stopped = slots[alive], tokens[alive], stopped[alive]
        logprobs = None if logprobs is None else logprobs.take(alive)
    at = columns.num_tokens[slots]
    num_tokens = at + 1
    columns.append_tokens(slots, at, tokens, num_tokens)
    reasons, stop_ids, ending = _endings(num_tokens >= columns.max_total[slots], stopped, tokens)
    applied.num_tokens = len(slots)
    if len(slots):
        outputs = Outputs(
            handles=columns.handle[slots],
            attempts=columns.attempt[slots],
            first_indices=(at - columns.num_prompt_tokens[slots]).view(_U32),
            num_tokens=ONE_EACH[: len(slots)],
            token_ids=tokens,
            finish_reasons=reasons,
            stop_token_ids=stop_ids,
            num_cached_tokens=columns.num_cached_tokens[slots].view(_U32),
            deaths=columns.deaths[slots],
            logprobs=logprobs,
        )
        applied.outputs = split(outputs, columns.client[slots])
    for i in ending:
        request = columns.requests[slots[i]]
        assert request is not None
        state.finish(request)
        applied.ended.append((request, int(reasons[i])))
    silent = rows.silent[columns.attached[rows.silent]].tolist()
    named = {slot for slot, *_ in errors}
    for slot in silent:
        if slot in rows.pooled:
            _pool(state, slot, rows.pooled[slot], applied)
        elif slot not in named:
            error = QuireError("internal_error", "the worker computed no token for the request.")
            errors.append((slot, error, False))
    _fail(state, errors, applied)
    state.settle()
    return applied


def _endings(full: Bool, stopped: Bool, tokens: I32) -> tuple[NDArray[np.uint8], I32, list[int]]:
    """Finish reasons [n], the tokens that stopped [n], -1 = none, and the indices of rows that
    end. UNFINISHED is 0."""
    reasons = np.zeros(len(tokens), np.uint8)
    over = full | stopped
    if not np.count_nonzero(over):
        return reasons, NO_STOPS[: len(tokens)], []
    reasons[full] = LENGTH
    reasons[stopped] = STOP
    return reasons, np.where(stopped, tokens, NO_STOPS[: len(tokens)]), over.nonzero()[0].tolist()


def _pool(state: State, slot: int, embedding: NDArray[np.float32], applied: Applied) -> None:
    request = state.columns.requests[slot]
    assert request is not None
    row = one_row(
        request.handle,
        request.attempt,
        0,
        STOP,
        num_cached_tokens=request.num_cached_tokens,
        deaths=request.deaths,
        embedding=embedding,
    )
    applied.outputs.append((request.client, row))
    state.finish(request)
    applied.ended.append((request, STOP))


def _fail(state: State, errors: list[tuple[int, QuireError, bool]], applied: Applied) -> None:
    for slot, error, _ in errors:
        request = state.columns.requests[slot]
        if request is not None:
            state.finish(request)
            applied.failed.append((request, error))


def _errors(state: State, result: step_pb2.StepResult) -> list[tuple[int, QuireError, bool]]:
    """(slot, error, doubtful) of rows that failed alone. Doubtful: the row may not have run,
    while others may share the prompt blocks it was to write."""
    columns = state.columns
    errors = []
    for row in result.row_errors:
        slot = row.slot
        if slot >= columns.max_slots or not columns.attached[slot]:
            continue
        name = row.error.name if row.error.name in KINDS else "internal_error"
        error = QuireError(name, row.error.message, param=row.error.param or None)
        first = bool(columns.num_tokens[slot] == columns.num_forced[slot])
        errors.append((slot, error, first and name != "numeric_error"))
    return errors


def split(outputs: Outputs, clients: I32) -> list[tuple[int, Outputs]]:
    """One delivery per client. `clients` [num_rows] are the rows' clients; a row has one token."""
    first = int(clients[0])
    if not np.count_nonzero(clients != first):
        return [(first, outputs)]
    parts = []
    for mine in _groups(clients):
        client = int(clients[mine[0]])
        logprobs = outputs.logprobs
        if logprobs is not None:
            chosen = np.zeros(len(clients), np.bool_)
            chosen[mine] = True
            logprobs = logprobs.take(chosen)
        parts.append(
            (
                client,
                Outputs(
                    handles=outputs.handles[mine],
                    attempts=outputs.attempts[mine],
                    first_indices=outputs.first_indices[mine],
                    num_tokens=outputs.num_tokens[mine],
                    token_ids=outputs.token_ids[mine],
                    finish_reasons=outputs.finish_reasons[mine],
                    stop_token_ids=outputs.stop_token_ids[mine],
                    num_cached_tokens=outputs.num_cached_tokens[mine],
                    deaths=outputs.deaths[mine],
                    logprobs=logprobs,
                ),
            )
        )
    return parts


def _groups(values: I32) -> list[Slots]:
    """Indices [n] of equal values, ascending in each group."""
    spread = values - values.min()
    if spread.max() < 1 << 16:
        spread = spread.astype(np.uint16)  # numpy sorts these ten times as fast
    order = spread.argsort(kind="stable")
    return np.split(order, np.diff(values[order]).nonzero()[0] + 1)
