"""How long a step takes: from the worker's table of measured points, then corrected by every step.

micros = a + b * tokens + c * context + d * attended + e * sampled, all at least 0, fitted for least
relative error; then times what steps of about that many tokens really took against it. Knows no
plan and no worker: it is told sizes and micros and asked for seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEP_TARGET_S = 0.25  # default budget: the largest chunk predicted to take less
MAX_AUTO_TOKENS = 8192
DEFAULT_TOKENS = 2048  # without a table
MIN_AUTO_TOKENS = 64
REFIT_EVERY = 16  # observed steps
SMOOTHING = 0.4
FORGETTING = 0.97  # a step, of how far others strayed
OUTLIER = 3.0  # a step so many times off counts as this far off: the machine was elsewhere
# Where points can't tell causes apart the one with the smallest weight takes it: a step's fixed
# cost before its rows', tokens before context.
RIDGE = np.diag([1e-4, 1e-4, 1e-3, 1e-3, 1e-2])
MAX_CELLS = 512


class StepSize(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int  # computed in the step
    num_context_tokens: int  # KV tokens read: sum over rows of their length after the step
    num_attended_tokens: int  # sum over tokens of the positions each attends to
    num_sampled: int = 1  # rows that yield something

    def with_chunk(self, num_tokens: int, start: int) -> StepSize:
        """With one row more: `num_tokens` from position `start` on, of which none is sampled."""
        return StepSize(
            self.num_tokens + num_tokens,
            self.num_context_tokens + start + num_tokens,
            self.num_attended_tokens + attended(num_tokens, start + num_tokens),
            self.num_sampled,
        )


class Point(NamedTuple):
    """A step of this size took so long."""

    size: StepSize
    micros: float


def attended(num_tokens: int, length: int) -> int:
    """Positions that the last `num_tokens` of a row of `length` tokens attend to, in sum."""
    return num_tokens * length - num_tokens * (num_tokens - 1) // 2


class StepCostModel:
    """Observed steps are kept as a running mean per cell of similar size; a mean replaces the
    table's points of the same cell. One thread writes, any may ask."""

    def __init__(self, table: Iterable[Point] = ()) -> None:
        self._table = [p for p in table if p.size.num_tokens > 0 and p.micros > 0]
        self._cells: dict[tuple[int, ...], NDArray[np.float64]] = {}  # mean of size and micros
        self._since_fit = 0
        # By the power of two of a step's tokens, where steps were seen: real time / fitted time,
        # and how far steps stray from that.
        self._powers: list[int] = []  # ascending
        self._ratios: list[float] = []
        self._strays: list[float] = []
        self.coefficients: tuple[float, ...] = (
            0.0,
        ) * 5  # a, b, c, d, e in micros; all 0 = nothing known
        self.default_budget = DEFAULT_TOKENS  # tokens of a step when none are set
        self._fit()

    @property
    def known(self) -> bool:
        return any(self.coefficients)

    def predict(self, size: StepSize) -> float:
        """Seconds; 0 while nothing is known."""
        ratio = _at(size.num_tokens, self._powers, self._ratios, 1.0)
        return self._fitted(size) * ratio * 1e-6

    def stray(self, num_tokens: int) -> float:
        """By what share such steps took longer than predicted, at worst, lately."""
        return _at(num_tokens, self._powers, self._strays, 0.0)

    def observe(self, size: StepSize, micros: int) -> None:
        """A step took so long."""
        if size.num_tokens < 1 or micros < 1:
            return
        fitted = self._fitted(size)
        if fitted > 0:
            ratio = self._correct(size.num_tokens.bit_length(), micros / fitted)
            micros = max(int(fitted * ratio), 1)
        key = tuple(n.bit_length() for n in size)
        point = np.array((*size, micros), float)
        mean = self._cells.get(key)
        if mean is None:
            if len(self._cells) >= MAX_CELLS:
                del self._cells[next(iter(self._cells))]
            self._cells[key] = point
        else:
            mean += SMOOTHING * (point - mean)
        self._since_fit += 1

    def refit(self) -> None:
        """Take the observed steps into the line, when enough are new. Deferred work: 0.3 ms."""
        if self._since_fit >= REFIT_EVERY or (self._since_fit and not self.known):
            self._fit()

    def largest_chunk(self, base: StepSize, start: int, seconds: float, most: int) -> int:
        """Tokens that one more row, from position `start` on, may compute in a step that holds
        `base` already and is to take `seconds`: 0 to `most`."""
        low, high = 0, most
        while low < high:  # predict() grows with the chunk, but for the last few per cent
            middle = (low + high + 1) // 2
            if self.predict(base.with_chunk(middle, start)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _fitted(self, size: StepSize) -> float:
        a, b, c, d, e = self.coefficients
        tokens, context, attends, sampled = size
        return a + b * tokens + c * context + d * attends + e * sampled

    def _correct(self, power: int, ratio: float) -> float:
        """Take one step's real / fitted time in; returns it without the excess of an outlier."""
        i = bisect_left(self._powers, power)
        if i == len(self._powers) or self._powers[i] != power:
            self._powers.insert(i, power)
            self._ratios.insert(i, ratio)
            self._strays.insert(i, 0.0)
        usual = self._ratios[i]
        ratio = min(max(ratio, usual / OUTLIER), usual * OUTLIER)
        self._strays[i] = max(ratio / usual - 1, self._strays[i] * FORGETTING)
        self._ratios[i] += SMOOTHING * (ratio - usual)
        return ratio

    def _fit(self) -> None:
        self._since_fit = 0
        cells = dict(self._cells)
        for size, took in self._table:
            cells.setdefault(tuple(n.bit_length() for n in size), np.array((*size, took), float))
        if not cells:
            return
        points = np.array(list(cells.values()))
        micros = points[:, 4]
        design = np.column_stack((np.ones(len(points)), points[:, :4])) / micros[:, None]
        scale = np.sqrt((design**2).mean(axis=0))
        scale[scale == 0] = 1.0
        design /= scale
        # Non-negative ridge regression by dropping what comes out negative and fitting again.
        causes = [0, 1, 2, 3, 4]
        while causes:
            part = design[:, causes]
            normal = part.T @ part + RIDGE[np.ix_(causes, causes)]
            fitted = np.linalg.solve(normal, part.sum(axis=0))
            if (fitted >= 0).all():
                break
            causes.pop(int(fitted.argmin()))
        line = np.zeros(5)
        line[causes] = fitted / scale[causes]
        self.coefficients = tuple(line.tolist())
        for i, power in enumerate(self._powers):  # what was corrected may be in the line now
            seen = np.array([cell for key, cell in self._cells.items() if key[0] == power])
            expected = line[0] + seen[:, :4] @ line[1:]
            if expected.all():
                self._ratios[i] = float((seen[:, 4] / expected).mean())
        chunk = self.largest_chunk(StepSize(0, 0, 0), 0, STEP_TARGET_S, MAX_AUTO_TOKENS)
        self.default_budget = max(MIN_AUTO_TOKENS, chunk // 16 * 16)


def _at(num_tokens: int, powers: list[int], values: list[float], default: float) -> float:
    """The value at so many tokens, linear between the middles of the powers."""
    if not powers:
        return default
    at = math.log2(max(num_tokens, 1)) + 0.5
    i = bisect_left(powers, at)
    if i in (0, len(powers)):
        return values[min(i, len(powers) - 1)]
    low, high = powers[i - 1], powers[i]
    return values[i - 1] + (values[i] - values[i - 1]) * (at - low) / (high - low)
