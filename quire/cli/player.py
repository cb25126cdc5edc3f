"""Recorded plans for a worker that did not live through what came before, and the comparison.

Knows plans and results; neither files nor how a worker is made. A plan's slots, seeds and rows are
what decides its tokens. Where a block came from is not: an admission carries all its tokens, so
whatever it had computed already (cache hits, blocks brought back from the host, a run's first half
that stands in an earlier segment) is computed again before its plan. That may rewrite a block that
running requests share: with equal bits, since they share it for having the same tokens, and a
row's bits depend on that row alone. So KV orders and block names need no replaying.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quire.v1 import step_pb2 as pb

PREFILL_TOKENS = 2048  # in one step that computes again what was not recorded

Execute = Callable[[pb.StepPlan], pb.StepResult]


class Player:
    """Runs recorded plans under epochs and numbers of its own, so that steps fit in between."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._epoch = 0  # ours
        self._seq = 0
        self._recorded = 0  # epoch of the plans that run now
        self._block_size = 1

    def new_worker(self, block_size: int) -> None:
        """What follows was recorded with another worker, or by another scheduler."""
        self._recorded = 0
        self._block_size = block_size

    def play(self, recorded: pb.StepPlan) -> pb.StepResult:
        """What the worker makes of a plan; to be given all plans of an epoch, in order."""
        if recorded.epoch != self._recorded:
            self._recorded = recorded.epoch
            self._epoch += 1
            self._seq = 0
        plan = pb.StepPlan()
        plan.CopyFrom(recorded)
        for name in ("kv_ops", "named_block_ids", "block_names"):
            plan.ClearField(name)
        errors: list[pb.RowError] = []
        if any(admit.num_computed_tokens for admit in plan.admit):
            errors = self._recompute(plan)
        result = self._run(plan)
        own = list(result.row_errors)
        result.ClearField("row_errors")
        result.row_errors.extend([*errors, *own])
        return result

    def _run(self, plan: pb.StepPlan) -> pb.StepResult:
        self._seq += 1
        plan.epoch, plan.seq = self._epoch, self._seq
        return self._execute(plan)

    def _recompute(self, plan: pb.StepPlan) -> list[pb.RowError]:
        """Take the plan's admissions out of it and run them ahead, up to where the plan takes them
        on; what they said of requests that failed at once. A block that several of them share is
        computed by the first alone."""
        part = pb.StepPlan(retired_slots=plan.retired_slots)
        debts: deque[tuple[int, int]] = deque()  # slot, tokens to compute
        ahead: set[int] = set()  # blocks computed here
        within: set[int] = set()  # blocks that the plan's own new rows compute, for each other too
        slots, counts = (np.frombuffer(c, "<i4").tolist() for c in (plan.slots, plan.num_tokens))
        rows_of = dict(zip(slots, counts, strict=True))
        size = self._block_size
        for admit in plan.admit:
            computed = admit.num_computed_tokens
            table = np.frombuffer(admit.block_ids, "<i4").tolist()
            hits = table[: computed // size]
            within.update(table[len(hits) : (computed + rows_of.get(admit.slot, 0)) // size])
            if computed % size == 0 and ahead.union(within).issuperset(hits):
                continue
            known = next((i for i, block in enumerate(hits) if block not in ahead), len(hits))
            ahead.update(hits)
            admit.num_computed_tokens = known * size
            debts.append((admit.slot, computed - known * size))
        part.admit.extend(plan.admit)
        for name in ("admit", "retired_slots"):
            plan.ClearField(name)
        errors: list[pb.RowError] = []
        while part.admit or debts:
            rows: list[tuple[int, int]] = []
            left = PREFILL_TOKENS
            while debts and left:
                slot, owed = debts.popleft()
                count = min(owed, left)
                left -= count
                rows.append((slot, count))
                if owed > count:
                    debts.appendleft((slot, owed - count))
            part.slots = np.array([slot for slot, _ in rows], "<i4").tobytes()
            part.num_tokens = np.array([count for _, count in rows], "<i4").tobytes()
            part.flags = bytes(len(rows))
            errors += self._run(part).row_errors
            part = pb.StepPlan()
        return errors


@dataclass(frozen=True)
class Difference:
    """The first thing in which two results of a step differ. slot -1: the step as a whole."""

    slot: int
    what: str
    expected: str
    got: str


def num_tokens(result: pb.StepResult) -> int:
    return len(result.token_ids) // 4


def difference(expected: pb.StepResult, got: pb.StepResult) -> Difference | None:
    """None when both say the same of every row: tokens, finishes, log-probabilities, vectors and
    errors. A step that failed when it was recorded has nothing to compare: see `failed`."""
    if got.status != expected.status:
        names = (pb.StepStatus.Name(r.status).removeprefix("STEP_STATUS_") for r in (expected, got))
        was, now = names
        return Difference(-1, "status", was, f"{now} ({got.error})" if got.error else now)
    slots, other = (np.frombuffer(r.slots, "<i4") for r in (expected, got))
    if not np.array_equal(slots, other):
        return Difference(-1, "rows", str(slots.tolist()), str(other.tolist()))
    errors, other_errors = _errors(expected), _errors(got)
    for slot in sorted(errors.keys() | other_errors.keys()):
        if errors.get(slot) != other_errors.get(slot):
            was, now = errors.get(slot, "no error"), other_errors.get(slot, "no error")
            return Difference(slot, "error", was, now)
    return _tokens(slots, expected, got) or _columns(slots, expected, got)


def failed(result: pb.StepResult) -> bool:
    """The recorded step was not run: a fault, and its epoch was over."""
    return result.status != pb.STEP_STATUS_OK


def _errors(result: pb.StepResult) -> dict[int, str]:
    return {row.slot: f"{row.error.name}: {row.error.message}" for row in result.row_errors}


def _tokens(slots: np.ndarray, expected: pb.StepResult, got: pb.StepResult) -> Difference | None:
    """Row by row: tokens [num_outputs] and whether they end the request."""
    at = other_at = 0
    tokens, other = (np.frombuffer(r.token_ids, "<i4") for r in (expected, got))
    same = expected.num_outputs == got.num_outputs and expected.finished == got.finished
    if same and np.array_equal(tokens, other):
        return None
    rows = zip(
        slots.tolist(), expected.num_outputs, got.num_outputs, expected.finished, got.finished,
        strict=False,
    )  # fmt: skip
    for slot, count, other_count, end, other_end in rows:
        was = tokens[at : at + count].tolist()
        now = other[other_at : other_at + other_count].tolist()
        if was != now:
            return Difference(slot, "token", _listed(was), _listed(now))
        if end != other_end:
            return Difference(slot, "finished", str(end), str(other_end))
        at += count
        other_at += other_count
    return Difference(-1, "columns", "of the plan's length", "another")


def _columns(slots: np.ndarray, expected: pb.StepResult, got: pb.StepResult) -> Difference | None:
    """Log-probabilities and vectors, bit for bit."""
    for name in ("counts", "ranks", "token_ids", "logprobs"):
        was, now = getattr(expected.logprobs, name), getattr(got.logprobs, name)
        if was != now:
            slot = _owner(slots, expected, was, now, each=name in ("counts", "ranks"))
            return Difference(slot, f"logprobs.{name}", *_first(was, now, name == "logprobs"))
    if expected.pooled != got.pooled:
        return Difference(-1, "pooled", *_first(expected.pooled, got.pooled, True))
    return None


def _owner(slots: np.ndarray, result: pb.StepResult, was: bytes, now: bytes, *, each: bool) -> int:
    """The slot to which the first differing cell of a log-probability column belongs; `each`: the
    column has one cell a token. -1 when the lengths differ."""
    if len(was) != len(now):
        return -1
    cell = int((np.frombuffer(was, "<u4") != np.frombuffer(now, "<u4")).argmax())
    if not each:
        ends = np.cumsum(np.frombuffer(result.logprobs.counts, "<u4"))
        cell = int(np.searchsorted(ends, cell, side="right"))
    owners = np.repeat(slots, np.frombuffer(result.num_outputs, np.uint8))
    return int(owners[cell]) if cell < len(owners) else -1


def _first(was: bytes, now: bytes, is_float: bool) -> tuple[str, str]:
    """The first differing cells of two columns of 4-byte cells, in words."""
    if len(was) != len(now):
        return f"{len(was) // 4} cells", f"{len(now) // 4} cells"
    cell = int((np.frombuffer(was, "<u4") != np.frombuffer(now, "<u4")).argmax())
    kind = "<f4" if is_float else "<i4"
    return str(np.frombuffer(was, kind)[cell]), str(np.frombuffer(now, kind)[cell])


def _listed(tokens: list[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"
