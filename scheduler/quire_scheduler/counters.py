"""Counters of the engine: plain numbers, cheap enough for the loop.

Knows no metrics library; metrics.py turns them into a page when somebody looks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015,
    0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Histogram:
    """Counts per bucket; the last one is beyond all bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _sizes() -> Histogram:
    return Histogram(SIZES)


@dataclass(slots=True)
class Counters:
    """Written by the engine thread, read by any."""

    # requests
    received: int = 0
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by error name, at the border
    finished: dict[str, int] = field(default_factory=dict)  # stop, length, abort, error
    # steps
    steps: int = 0
    output_tokens: int = 0
    scheduled_tokens: int = 0
    prompt_tokens: int = 0
    # trouble
    epochs: int = 0
    worker_losses: int = 0
    failed_steps: int = 0
    frames_dropped: dict[str, int] = field(default_factory=dict)  # by reason
    # the journal
    journal_bytes: int = 0
    journal_segments: int = 0
    journal_failed: bool = False  # it is off because of an error
    # histograms
    queue_time: Histogram = field(default_factory=_seconds)  # arrival -> first plan
    plan_time: Histogram = field(default_factory=_seconds)
    wire_time: Histogram = field(default_factory=_seconds)
    worker_queue_time: Histogram = field(default_factory=_seconds)
    prepare_time: Histogram = field(default_factory=_seconds)
    forward_time: Histogram = field(default_factory=_seconds)
    copy_time: Histogram = field(default_factory=_seconds)  # of steps that copy blocks
    sample_time: Histogram = field(default_factory=_seconds)
    idle_time: Histogram = field(default_factory=_seconds)
    step_time: Histogram = field(default_factory=_seconds)  # on the worker, without queue and idle
    batch_size: Histogram = field(default_factory=_sizes)
    prefill_tokens: Histogram = field(default_factory=_sizes)
    decode_tokens: Histogram = field(default_factory=_sizes)

    def drop(self, reason: str) -> None:
        self.frames_dropped[reason] = self.frames_dropped.get(reason, 0) + 1

    def reject(self, name: str) -> None:
        self.rejected[name] = self.rejected.get(name, 0) + 1

    def finish(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1
