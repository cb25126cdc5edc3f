"""What a step says of itself: its output columns, its timings, its row errors.

Knows the shapes of StepResult; not how a token was drawn or a plan was judged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.errors import QuireError
from quire.v1 import common_pb2 as common
from quire.v1 import step_pb2 as pb
from quire_worker.sampler import Sampled

_U32 = (1 << 32) - 1


@dataclass(slots=True)
class StepStats:
    """One executed step, for metrics. Times in nanoseconds."""

    queue: int = 0
    prepare: int = 0
    forward: int = 0
    sample: int = 0
    idle: int = 0
    copy: int = 0
    num_copied: int = 0  # blocks
    num_rows: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_sampled: int = 0


class Clock:
    """Splits a step into prepare, forward and sample; on a GPU by events on its stream, since
    the host only queues the forward."""

    def __init__(self, device: torch.device, begin: int) -> None:
        self._cuda = device.type == "cuda"
        self._times = [begin]
        self._events: list[Any] = []

    def mark(self) -> None:
        self._times.append(time.monotonic_ns())
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def split(self) -> tuple[int, int, int]:
        """(prepare, forward, sample) in ns; the sum is the time since the beginning. Waits for
        the device."""
        if self._cuda and self._events:
            torch.cuda.current_stream().synchronize()
        times = self._times
        end = time.monotonic_ns()
        if len(times) == 1:
            return end - times[0], 0, 0
        prepare, rest = times[1] - times[0], end - times[1]
        if len(times) == 2:
            return prepare, rest, 0
        forward = times[2] - times[1]
        if self._cuda:
            forward = min(int(self._events[0].elapsed_time(self._events[1]) * 1e6), rest)
        return prepare, forward, rest - forward


def add_row_error(result: pb.StepResult, slot: int, error: QuireError) -> None:
    message = common.Error(name=error.name, message=error.message, param=error.param or "")
    result.row_errors.append(pb.RowError(slot=slot, error=message))


def fill_timings(result: pb.StepResult, stats: StepStats) -> None:
    result.timings.queue_micros = min(stats.queue // 1000, _U32)
    result.timings.prepare_micros = min(stats.prepare // 1000, _U32)
    result.timings.forward_micros = min(stats.forward // 1000, _U32)
    result.timings.sample_micros = min(stats.sample // 1000, _U32)
    result.timings.idle_micros = min(stats.idle // 1000, _U32)
    result.timings.copy_micros = min(stats.copy // 1000, _U32)


def fill_outputs(
    result: pb.StepResult,
    asked: np.ndarray,
    finished: np.ndarray,
    sampling: np.ndarray,
    good: np.ndarray,
    drawn: Sampled | None,
) -> None:
    """asked i32 [num_out_rows]: slots whose rows were to sample, finished bool [num_out_rows];
    sampling i32 [n]: those that ran, good bool [n]: those that got a token."""
    if len(asked) == len(sampling) and good.all():
        num_outputs = good
    else:  # some rows were skipped or failed
        num_outputs = np.isin(asked, sampling[good])
    result.slots = asked.tobytes()
    result.num_outputs = num_outputs.astype(np.uint8).tobytes()
    result.finished = finished.astype(np.uint8).tobytes()
    if drawn is None:
        return
    result.token_ids = drawn.tokens[good].astype("<i4", copy=False).tobytes()
    if drawn.logprobs is not None:
        _fill_logprobs(result.logprobs, drawn, good)


def _fill_logprobs(message: common.LogprobColumns, drawn: Sampled, good: np.ndarray) -> None:
    """Columns over the tokens that came out: the sampled one, then the most likely ones."""
    logprobs = drawn.logprobs
    assert logprobs is not None
    counts = np.zeros(len(drawn.tokens), "<u4")
    ranks = np.zeros(len(drawn.tokens), "<u4")
    counts[logprobs.rows] = logprobs.num_top + 1
    ranks[logprobs.rows] = logprobs.ranks
    sampled = drawn.tokens[logprobs.rows]
    ids = np.concatenate((sampled[:, None], logprobs.top_ids), axis=1)
    values = np.concatenate((logprobs.sampled[:, None], logprobs.top), axis=1)
    kept = np.arange(ids.shape[1])[None, :] <= logprobs.num_top[:, None]
    kept &= good[logprobs.rows][:, None]
    message.counts = counts[good].tobytes()
    message.ranks = ranks[good].tobytes()
    message.token_ids = ids[kept].astype("<i4").tobytes()
    message.logprobs = values[kept].astype("<f4").tobytes()
