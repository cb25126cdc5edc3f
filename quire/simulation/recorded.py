"""A latency table out of a journal: what each recorded step held, and how long it took.

Reads the frames of the step wire; nothing of a model, and nothing of what was said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ConfigError
from quire.latency_table import MAX_MICROS, MAX_POINTS, LatencyTable, spread
from quire.v1 import step_pb2

KEPT_POINTS = 20_000  # of a long journal, spread evenly over it


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame and when the scheduler sent or got it."""

    at_ns: int
    plan: step_pb2.StepPlan | None = None
    worker: step_pb2.WorkerFrame | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded step. Times in microseconds on the scheduler's clock."""

    size: tuple[int, int, int, int]  # tokens, context, attended, sampled
    sent: float
    answered: float
    took: float


@dataclass(slots=True)
class _Slots:
    """Computed tokens by slot, as plans tell them."""

    computed: dict[int, int] = field(default_factory=dict)

    def size(self, plan: step_pb2.StepPlan) -> tuple[int, int, int, int]:
        for admit in plan.admit:
            self.computed[admit.slot] = admit.num_computed_tokens
        tokens = context = attended = 0
        nums = _i32(plan.num_tokens)
        for slot, num in zip(_i32(plan.slots).tolist(), nums.tolist(), strict=True):
            end = self.computed.get(slot, 0) + num
            self.computed[slot] = end
            tokens += num
            context += end
            attended += num * end - num * (num - 1) // 2
        flags = np.frombuffer(plan.flags, np.uint8)
        return tokens, context, attended, int((flags & step_pb2.ROW_FLAG_SAMPLE != 0).sum())


def frames(path: str) -> Iterator[Frame]:
    """All frames of a journal. Raises ConfigError where it is none, or damaged."""
    from quire_scheduler.segment import Direction, Segment, segments

    try:
        for segment in map(Segment, segments(path)):
            for record in segment:
                if record.direction is Direction.PLAN:
                    message = step_pb2.SchedulerFrame.FromString(record.frame)
                    yield Frame(record.monotonic_ns, plan=message.plan)
                else:
                    worker = step_pb2.WorkerFrame.FromString(record.frame)
                    yield Frame(record.monotonic_ns, worker=worker)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as a journal: {error}.") from None


def steps(found: Iterable[Frame]) -> Iterator[Step]:
    """The steps that were answered with OK, in order."""
    slots = _Slots()
    epoch = 0
    sent: dict[int, tuple[float, tuple[int, int, int, int]]] = {}
    for frame in found:
        if frame.plan is not None:
            if frame.plan.epoch != epoch:
                epoch = frame.plan.epoch
                slots.computed.clear()
                sent.clear()
            sent[frame.plan.seq] = (frame.at_ns / 1e3, slots.size(frame.plan))
        elif frame.worker is not None and frame.worker.HasField("result"):
            result = frame.worker.result
            known = sent.pop(result.seq, None) if result.epoch == epoch else None
            if known is None or result.status != step_pb2.STEP_STATUS_OK or not known[1][0]:
                continue
            t = result.timings
            took = t.prepare_micros + t.forward_micros + t.sample_micros
            if 0 < took <= MAX_MICROS:
                yield Step(known[1], known[0], frame.at_ns / 1e3, took)


def from_hello(hello: step_pb2.Hello) -> LatencyTable:
    """What a worker tells of itself: its sizes, and the points it measured at start."""
    tiers = {tier.tier: tier for tier in hello.tiers}
    device, host = tiers.get(step_pb2.TIER_DEVICE), tiers.get(step_pb2.TIER_HOST)
    if device is None:
        raise ConfigError("the worker's Hello tells of no KV memory.")
    eos = hello.eos_token_ids[0] if hello.eos_token_ids else 0
    costs = [
        (c.num_tokens, c.num_context_tokens, c.num_attended_tokens, 1, c.micros)
        for c in hello.step_costs
        if c.num_tokens and c.micros
    ]
    return LatencyTable(
        model=hello.model,
        model_digest=hello.model_digest,
        dtype=hello.dtype,
        kv_dtype=hello.kv_dtype,
        block_size=hello.block_size,
        num_blocks=device.num_blocks,
        block_bytes=max(device.block_bytes, 1),
        num_host_blocks=host.num_blocks if host is not None else 0,
        copy_micros=host.copy_micros if host is not None else 20,
        max_slots=hello.max_slots,
        max_model_len=hello.max_model_len,
        vocab_size=hello.vocab_size,
        eos_token_id=eos,
        points=tuple(tuple(map(float, cost)) for cost in costs),
    )


def from_journal(path: str) -> LatencyTable:
    """A table of the recorded steps. Raises ConfigError when there is too little in the journal."""
    hello: step_pb2.Hello | None = None

    def watch(found: Iterable[Frame]) -> Iterator[Frame]:
        nonlocal hello
        for frame in found:
            if frame.worker is not None and frame.worker.HasField("hello"):
                hello = frame.worker.hello
            yield frame

    run = list(steps(watch(frames(path))))
    if hello is None or not run:
        raise ConfigError(f"{path} holds no worker's Hello, or no step: nothing to measure.")
    base = from_hello(hello)
    every = max(-(-len(run) // min(KEPT_POINTS, MAX_POINTS)), 1)
    points = tuple((*map(float, s.size), float(s.took)) for s in run[::every])
    return dataclasses.replace(base, points=points, **overheads(run)).check()


def overheads(run: list[Step]) -> dict[str, Any]:
    """What steps cost beside themselves: the wire there and back of those that were sent alone, and
    what lay before those that were sent while another ran."""
    alone, behind = [], []
    for a, b in zip(run, run[1:], strict=False):
        if b.sent < a.answered:
            behind.append(b.answered - a.answered - b.took)
        else:
            alone.append(b.answered - b.sent - b.took)
    # the wire of a step that was alone holds one step's overhead too
    usual = float(np.median(behind)) if behind else 0.0
    return {
        "step_overhead_micros": spread(behind),
        "round_trip_micros": spread([wire - usual for wire in alone]),
    }


def _i32(column: bytes) -> NDArray[np.int32]:
    return np.frombuffer(column, "<i4")
