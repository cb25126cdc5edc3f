"""How long a step takes: a line over tokens and context, from the worker's table, then corrected.

Knows no plan and no worker: it is told points (tokens, context tokens, micros) and asked for
seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

STEP_TARGET_S = 0.25  # default budget: the largest chunk predicted to take less
MAX_AUTO_TOKENS = 8192
DEFAULT_TOKENS = 2048  # without a table
MIN_AUTO_TOKENS = 64
REFIT_EVERY = 32  # observed steps
SMOOTHING = 0.2

Point = tuple[float, float, float]  # tokens, context tokens, micros


class StepCostModel:
    """micros = a + b * tokens + c * context tokens, least relative error, all at least 0.

    Observed steps are kept as a running mean per power of two of their tokens; a mean replaces
    the table's points of the same power.
    """

    def __init__(self, table: Iterable[Point] = ()) -> None:
        self._table: list[Point] = [p for p in table if p[0] > 0 and p[2] > 0]
        self._seen: dict[int, Point] = {}
        self._since_fit = 0
        self.coefficients = np.zeros(3)  # a, b, c; all 0 = nothing known
        self._fit()

    @property
    def known(self) -> bool:
        return bool(self.coefficients.any())

    def predict(self, num_tokens: int, num_context_tokens: int) -> float:
        """Seconds; 0 while nothing is known."""
        a, b, c = self.coefficients
        return float(a + b * num_tokens + c * num_context_tokens) * 1e-6

    def observe(self, num_tokens: int, num_context_tokens: int, micros: int) -> None:
        """A step took so long."""
        if num_tokens < 1 or micros < 1:
            return
        power = num_tokens.bit_length()
        point = (float(num_tokens), float(num_context_tokens), float(micros))
        old = self._seen.get(power)
        if old is not None:
            point = (
                old[0] + SMOOTHING * (point[0] - old[0]),
                old[1] + SMOOTHING * (point[1] - old[1]),
                old[2] + SMOOTHING * (point[2] - old[2]),
            )
        self._seen[power] = point
        self._since_fit += 1
        if self._since_fit >= REFIT_EVERY or not self.known:
            self._fit()

    def largest_chunk(self) -> int:
        """The default token budget of a step."""
        if not self.known:
            return DEFAULT_TOKENS
        a, b, c = self.coefficients
        per_token = b + c  # a chunk from position 0 reads each of its tokens once
        if per_token <= 0:
            return MAX_AUTO_TOKENS
        tokens = int((STEP_TARGET_S * 1e6 - a) / per_token)
        return max(MIN_AUTO_TOKENS, min(MAX_AUTO_TOKENS, tokens // 16 * 16))

    def _fit(self) -> None:
        self._since_fit = 0
        points = list(self._seen.values())
        points += [p for p in self._table if int(p[0]).bit_length() not in self._seen]
        if not points:
            return
        at = np.array(points)
        weight = 1.0 / at[:, 2]
        design = np.column_stack((np.ones(len(at)), at[:, 0], at[:, 1])) * weight[:, None]
        # Non-negative least squares for three unknowns: drop what comes out negative, fit again.
        columns = [0, 1, 2]
        while columns:
            fitted = np.linalg.lstsq(design[:, columns], at[:, 2] * weight, rcond=None)[0]
            if (fitted >= 0).all():
                self.coefficients = np.zeros(3)
                self.coefficients[columns] = fitted
                return
            columns.pop(int(fitted.argmin()))
