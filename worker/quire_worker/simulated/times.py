"""How long a simulated step takes: the table's prediction, strayed from as measured steps did.

The line of StepCostModel gives the shape; the factor on it is drawn from the table's steps that
are most alike, so that the slow ones come as often as they came. Where the table holds a few means
instead of many single steps there is nothing to draw. Knows no plan and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.step_cost import Point, StepCostModel, StepSize, attended

FEW = 64  # points that stand for themselves: they are means, not single steps
ALIKE = 24  # measured steps that a factor is drawn from
STRETCH = np.array([4.0, 0.5, 0.5, 1.0])  # how much each part of a size counts for likeness


class StepTimes:
    """points: rows of (tokens, context, attended, sampled, micros); seed: of the drawing."""

    def __init__(self, points: Sequence[Sequence[float]], seed: int = 0) -> None:
        table = np.array(points, float)  # [num_points, 5]
        self._model = StepCostModel(_middles(table))
        self._only = float(table[0, 4]) if (table[:, 4] == table[0, 4]).all() else 0.0
        self._rng = np.random.default_rng(seed)
        self._places = self._factors = np.zeros(0)
        self._alike: dict[bytes, np.ndarray] = {}  # rounded place -> factors [ALIKE]
        if len(table) > FEW:
            fitted = [self._model.predict(StepSize(*row[:4])) * 1e6 for row in table.tolist()]
            self._places = _place(table[:, :4])  # [num_points, 4]
            self._factors = table[:, 4] / np.maximum(fitted, 1e-3)

    def pick(self, micros: Sequence[int]) -> float:
        """Seconds: one of the values, each as likely as another."""
        if len(micros) == 1:
            return micros[0] * 1e-6
        return micros[int(self._rng.integers(len(micros)))] * 1e-6

    def mean(self, size: StepSize) -> float:
        """Seconds that such a step usually takes."""
        return self._only * 1e-6 if self._only else self._model.predict(size)

    def draw(self, size: StepSize) -> float:
        """Seconds that one such step takes; another may take longer."""
        mean = self.mean(size)
        if self._only or not len(self._factors):
            return mean
        place = _place(np.array(size, float))
        key = np.rint(2 * place).astype(np.int16).tobytes()
        factors = self._alike.get(key)
        if factors is None:
            far = np.abs(self._places - place).sum(axis=1)
            factors = self._alike[key] = self._factors[np.argsort(far, kind="stable")[:ALIKE]]
        return mean * float(factors[self._rng.integers(len(factors))])

    def hello_points(self, max_model_len: int) -> list[tuple[StepSize, int]]:
        """What a worker measures before its first plan: one row, short and behind a context."""
        context = min(2048, max_model_len)
        pairs = ((1, 1), (min(512, context), min(512, context)), (1, context), (16, context))
        sizes = {StepSize(n, c, attended(n, c)) for n, c in pairs if n <= c}
        return [(size, max(round(self.mean(size) * 1e6), 1)) for size in sorted(sizes)]


def _place(sizes: np.ndarray) -> np.ndarray:
    return np.asarray(np.log2(sizes + 1) * STRETCH)


def _middles(table: np.ndarray) -> list[Point]:
    """The median step of each kind of size: the model takes one point a kind."""
    kinds = np.floor(np.log2(np.maximum(table[:, :4], 0.5))).astype(int)
    found = []
    _, members = np.unique(kinds, axis=0, return_inverse=True)
    for kind in range(int(members.max()) + 1):
        rows = np.median(table[members.reshape(-1) == kind], axis=0)
        found.append(Point(StepSize(*np.rint(rows[:4]).astype(int).tolist()), float(rows[4])))
    return found
