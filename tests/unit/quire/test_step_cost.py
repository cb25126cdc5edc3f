"""The step-cost model: what the table says, what steps teach, and the chunk solved from both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.step_cost import (
    DEFAULT_TOKENS,
    MAX_AUTO_TOKENS,
    Point,
    StepCostModel,
    StepSize,
    attended,
)


def chunk(num_tokens: int, length: int, sampled: int = 1) -> StepSize:
    """One row: the last num_tokens of `length`."""
    return StepSize(num_tokens, length, attended(num_tokens, length), sampled)


def table(a: float, b: float, c: float, d: float = 0.0) -> list[Point]:
    sizes = [chunk(1, 1), chunk(512, 512), chunk(1, 2048), chunk(16, 2048)]
    return [
        Point(s, a + b * s.num_tokens + c * s.num_context_tokens + d * s.num_attended_tokens)
        for s in sizes
    ]


def test_attended_counts_every_pair():
    assert attended(5, 5) == 15 and attended(1, 100) == 100
    assert attended(3, 10) == 8 + 9 + 10


def test_what_the_table_says_is_predicted():
    model = StepCostModel(table(1000, 50, 0.5))
    assert model.predict(chunk(512, 512)) == pytest.approx(26856e-6, rel=0.02)
    assert model.predict(chunk(1, 2048)) == pytest.approx(2074e-6, rel=0.05)
    assert model.predict(chunk(256, 256)) == pytest.approx(13928e-6, rel=0.05)


def test_steps_correct_the_table():
    model = StepCostModel(table(1000, 50, 0.5))
    for _ in range(50):
        for tokens in (1, 2, 4, 8, 16, 64, 256, 512):
            model.observe(chunk(tokens, tokens), 2000 + 100 * tokens)
    assert model.predict(chunk(64, 64)) == pytest.approx(8400e-6, rel=0.15)
    model.refit()
    assert model.predict(chunk(128, 128)) == pytest.approx(14800e-6, rel=0.15)
    assert model.predict(chunk(512, 512)) == pytest.approx(53200e-6, rel=0.15)


def test_rows_that_sample_are_told_from_tokens():
    """32 decoding rows cost more than a prompt of 32 tokens where the vocabulary is large."""
    model = StepCostModel(table(1000, 50, 0.5))
    for _ in range(100):
        for n in (2, 4, 8, 16, 32, 64):
            model.observe(StepSize(n, n * 100, n * 100, n), 1000 + 50 * n + 50 * n + 400 * n)
            model.observe(chunk(n, n), 1000 + 50 * n + 400)
        model.refit()
    rows, prompt = StepSize(32, 3200, 3200, 32), chunk(32, 32)
    assert model.predict(rows) > 2 * model.predict(prompt)


def test_without_a_table_nothing_is_known_until_a_step_came():
    model = StepCostModel()
    assert not model.known and model.predict(chunk(100, 100)) == 0
    assert model.default_budget == DEFAULT_TOKENS
    model.observe(chunk(10, 10), 500)
    model.refit()
    assert model.known and model.predict(chunk(10, 10)) == pytest.approx(500e-6, rel=0.05)


def test_one_outlier_moves_little():
    model = StepCostModel(table(1000, 50, 0.5))
    for _ in range(100):
        model.observe(chunk(64, 64), 4232)
    model.observe(chunk(64, 64), 4_232_000)
    assert model.predict(chunk(64, 64)) < 2 * 4232e-6
    assert model.stray(64) == pytest.approx(2.0)  # as far as an outlier counts


def test_the_default_budget_takes_a_quarter_of_a_second():
    model = StepCostModel(table(10_000, 100, 20))
    tokens = model.default_budget
    assert tokens % 16 == 0
    assert model.predict(chunk(tokens, tokens)) == pytest.approx(0.25, rel=0.05)
    assert StepCostModel(table(100, 1, 0)).default_budget == MAX_AUTO_TOKENS
    assert StepCostModel(table(900_000, 9000, 1)).default_budget == 64


def test_costs_never_shrink_with_size():
    model = StepCostModel(
        [Point(chunk(1, 1), 900), Point(chunk(64, 64), 100), Point(chunk(512, 512), 50)]
    )
    assert min(model.coefficients) >= 0


@given(
    rows=st.integers(0, 64),
    start=st.integers(0, 32_000),
    target=st.floats(0.001, 1.0),
    d=st.floats(0, 0.05),
)
def test_the_largest_chunk_is_the_largest(rows: int, start: int, target: float, d: float) -> None:
    model = StepCostModel(table(1000, 50, 0.5, d))
    base = StepSize(rows, rows * 50, rows * 50, rows)
    tokens = model.largest_chunk(base, start, target, 4096)
    if tokens:
        assert model.predict(base.with_chunk(tokens, start)) <= target
    if tokens < 4096:
        assert model.predict(base.with_chunk(tokens + 1, start)) > target
