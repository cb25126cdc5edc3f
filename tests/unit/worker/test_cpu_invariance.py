"""The start-up proof finds differing row counts, pads, falls back, and says what it found."""

from __future__ import annotations

import pytest
import torch

from quire_kernels.cpu import invariance
from quire_kernels.cpu.linear import CpuLinear, make_linear
from quire_kernels.cpu.plan import Tiling, large_query_tokens, tile_tokens_for


def linear_that_differs(monkeypatch: pytest.MonkeyPatch, rows_differ) -> CpuLinear:
    """A linear whose product changes in the last bit for the row counts `rows_differ` names."""
    linear = make_linear(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    true = CpuLinear.raw

    def raw(self: CpuLinear, x: torch.Tensor) -> torch.Tensor:
        y = true(self, x)
        return y * (1 + 1e-6) if rows_differ(x.shape[0]) else y

    monkeypatch.setattr(CpuLinear, "raw", raw)
    return linear


@pytest.mark.parametrize(
    ("differ", "expected"),
    [
        (lambda n: False, (1, 0)),
        (lambda n: n == 1, (2, 0)),
        (lambda n: n in (1, 2, 3, 5, 6, 7, 9, 10, 11), (4, 0)),
        (lambda n: n % 8 != 0, (8, 0)),
        (lambda n: n != 128, (1, 32)),
    ],
)
def test_padding_is_the_least_that_agrees(monkeypatch, differ, expected) -> None:
    linear = linear_that_differs(monkeypatch, differ)
    assert invariance.prove_linear(linear, torch.float32) == expected


def test_padded_and_blocked_rows_agree_where_raw_rows_do_not(monkeypatch) -> None:
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(1))
    linear = linear_that_differs(monkeypatch, lambda n: n % 4 != 0)
    assert not torch.equal(linear(x[:3]), linear(x[:8])[:3])
    linear.row_multiple = 4
    assert torch.equal(linear(x[:3]), linear(x[:8])[:3])
    linear = linear_that_differs(monkeypatch, lambda n: n != 32)
    linear.row_block = 32
    assert torch.equal(linear(x)[:3], linear(x[:3]))


def prove(linears, monkeypatch=None):
    return invariance.prove(
        linears, num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, hidden_size=64,
        intermediate_size=96, dtype=torch.float32,
    )  # fmt: skip


def test_the_outcome_names_what_bits_depend_on_and_padding_apart(monkeypatch) -> None:
    linear = linear_that_differs(monkeypatch, lambda n: n == 1)
    outcome = prove([linear, linear])
    isa = torch.backends.cpu.get_cpu_capability().lower().replace("_", "")
    assert outcome.name.startswith(f"cpu-{isa}-float32-")
    assert outcome.name.endswith("-kv64")
    assert "rows padded to 2" in outcome.detail
    assert linear.row_multiple == 2


def test_attention_falls_back_to_one_size_and_then_admits_failure(monkeypatch) -> None:
    monkeypatch.setattr(invariance, "_products_agree", lambda sizes, *rest: len(sizes) == 1)
    assert invariance.prove_attention(4, 2, 32, 64) == (Tiling(4, 0), True)
    monkeypatch.setattr(invariance, "_products_agree", lambda *_: False)
    assert invariance.prove_attention(4, 2, 32, 64) == (Tiling(16, 0), False)
    assert prove([make_linear(torch.eye(8))]).name.endswith("-unproven")


def test_the_proof_leaves_threads_and_random_state_alone() -> None:
    before = torch.get_num_threads(), torch.random.get_rng_state()
    prove([make_linear(torch.eye(8))])
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_tiles_are_whole_blocks_and_items_keep_their_rows() -> None:
    assert [tile_tokens_for(n) for n in (1, 8, 16, 24, 64, 128)] == [64, 64, 64, 48, 64, 128]
    assert [large_query_tokens(g, Tiling()) for g in (1, 2, 3, 8, 64)] == [64, 32, 20, 8, 4]
    assert large_query_tokens(2, Tiling(4, 0)) == 0
