"""Penalties, temperature and filters: against plain definitions, and each row independent of the
others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire_kernels import logits as L


def rows(n: int = 6, vocab: int = 2000, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(n + vocab)) * scale


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def defined(row: torch.Tensor, k: int, p: float, min_p: float) -> torch.Tensor:
    """One row by the definitions, in float64."""
    row = row.double()
    kept = torch.ones_like(row, dtype=torch.bool)
    if 0 < k < len(row):
        kept &= row >= row.sort(descending=True).values[k - 1]
    if p < 1:
        probs = row.masked_fill(~kept, float("-inf")).softmax(-1)
        ranked, order = probs.sort(descending=True)
        count = int((ranked.cumsum(-1) - ranked < p).sum())
        kept &= probs >= ranked[max(count, 1) - 1]
    kept &= row.softmax(-1) >= min_p * row.softmax(-1).max()
    return kept


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(
    ("k", "p", "min_p"),
    [
        (0, 1, 0),
        (1, 1, 0),
        (50, 1, 0),
        (50, 0.8, 0),
        (0, 0.9, 0),
        (0, 0.05, 0),
        (700, 0.99, 0),
        (0, 1, 0.1),
        (40, 0.9, 0.05),
        (0, 0, 0),
    ],
)
def test_filters_keep_what_their_definitions_keep(
    k: int, p: float, min_p: float, scale: float
) -> None:
    x = rows(scale=scale)
    n = len(x)
    got = L.mask_top_k_top_p_min_p(
        x, torch.full((n,), k), torch.full((n,), float(p)), torch.full((n,), float(min_p))
    )
    for i in range(n):
        assert torch.equal(got[i] > float("-inf"), defined(x[i], k, p, min_p)), i
    assert torch.equal(got[got > float("-inf")], x[got > float("-inf")])


def test_equal_logits_stay_or_go_together() -> None:
    x = torch.zeros(1, 3000)
    x[0, 2000:] = 1.0
    got = L.mask_top_k_top_p_min_p(x, torch.tensor([10]))
    assert (got > float("-inf")).sum() == 1000


def test_the_short_list_and_the_whole_sort_agree() -> None:
    x = rows(8, 5000, 4.0)
    k = torch.tensor([0, 1, 5, 600, 0, 0, 40, 5000])
    p = torch.tensor([0.9, 1.0, 0.5, 0.9, 0.999, 1.0, 0.3, 0.7])
    full_k = torch.where(k == 0, 5000, k)
    short = L._threshold_short(x, full_k, p)
    whole = L._threshold(x, full_k, p)
    torch.testing.assert_close(short, whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(threads: int) -> None:
    x = rows(5, 70_000)
    n = len(x)
    args: dict[str, Any] = {
        "top_k": torch.tensor([0, 20, 0, 5000, 0]),
        "top_p": torch.tensor([0.9, 0.9, 1.0, 0.95, 0.9999]),
        "min_p": torch.tensor([0.0, 0.01, 0.2, 0.0, 0.0]),
    }
    temperatures = torch.tensor([0.7, 1.0, 0.0, 1.3, 0.9])
    together = L.process_logits(x, temperatures, **args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i in range(n):
            one = slice(i, i + 1)
            alone = L.process_logits(
                x[one], temperatures[one], **{k: v[one] for k, v in args.items()}
            )
            assert torch.equal(bits(alone), bits(together[one]))
    finally:
        torch.set_num_threads(before)


def test_rows_with_everything_off_keep_their_bits() -> None:
    x = rows(3, 100)
    x[0, 3], x[0, 4] = -0.0, float("-inf")
    x[1, 5] = float("nan")
    counts = torch.ones(3, 100, dtype=torch.int32)
    off = L.Penalties(counts, counts > 0, torch.ones(3), torch.zeros(3), torch.zeros(3))
    got = L.process_logits(
        x,
        torch.tensor([1.0, 0.0, 1.0]),
        top_k=torch.zeros(3, dtype=torch.int32),
        top_p=torch.ones(3),
        min_p=torch.zeros(3),
        penalties=off,
    )
    assert torch.equal(bits(got), bits(x))


def test_penalties_by_hand() -> None:
    x = torch.tensor([[2.0, -2.0, 1.0, 4.0]]).expand(2, -1)
    counts = torch.tensor([[2, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    prompt = torch.tensor([[False, False, True, False], [False] * 4])
    got = L.apply_penalties(
        x,
        counts,
        prompt,
        torch.tensor([2.0, 1.0]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.25, 1.0]),
    )
    assert got.tolist() == [[1.0 - 1.0, -4.0 - 0.75, 0.5, 4.0], [2.0, -2.0, 1.0, 3.0]]
    assert x[0].tolist() == [2.0, -2.0, 1.0, 4.0]


def test_temperature_divides_and_zero_means_greedy() -> None:
    x = rows(2, 10)
    got = L.apply_temperature(x, torch.tensor([0.5, 0.0]))
    assert torch.equal(got[0], x[0] / 0.5)
    assert torch.equal(got[1], x[1])
