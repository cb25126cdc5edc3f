"""The CPU's paged attention: right against the plain reference, and the same bits in any batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from quire_kernels import attention as reference
from quire_kernels.cpu.attention import paged_attention
from quire_kernels.cpu.plan import StepPlan, Tiling


def make_case(
    requests: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """requests: (query_len, seq_len). Blocks are scattered; unused table entries are nonsense."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for _, length in requests]
    shape = (sum(needed) + 4, 3, 2, kv_heads, block_size, head_dim)
    pool = torch.randn(shape, generator=generator).to(dtype)
    scattered = torch.randperm(sum(needed) + 4, generator=generator).int()
    num_slots = len(requests) + 3
    table = torch.full((num_slots, max(needed, default=1) + 2), -7, dtype=torch.int32)
    slots = torch.randperm(num_slots, generator=generator)[: len(requests)].int()
    at = 0
    for slot, count in zip(slots.tolist(), needed, strict=True):
        table[slot, :count] = scattered[at : at + count]
        at += count
    starts = [0, *itertools.accumulate(n for n, _ in requests)]
    q = torch.randn((starts[-1], heads, head_dim), generator=generator).to(dtype)
    return {
        "out": torch.zeros_like(q),
        "q": q,
        "k_cache": pool[:, 1, 0],
        "v_cache": pool[:, 1, 1],
        "block_table": table,
        "slots": slots,
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor([n for _, n in requests], dtype=torch.int32),
        "scale": head_dim**-0.5,
        "sliding_window": window,
        "block_size": block_size,
    }


def run(case: dict[str, Any], plan: StepPlan | None = None) -> torch.Tensor:
    paged_attention(**case, plan=plan)
    return case["out"].clone()


MIXED = [(1, 100), (1, 1), (5, 70), (100, 100), (37, 200), (1, 199), (0, 5), (90, 130)]
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window": {"window": 50},
    "mha": {"heads": 4, "kv_heads": 4},
    "mqa": {"heads": 7, "kv_heads": 1, "head_dim": 16},
    "odd group": {"heads": 6, "kv_heads": 2, "block_size": 8, "window": 20},
    "large blocks": {"block_size": 128},
    "bf16": {"dtype": torch.bfloat16},
    "f16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name: str) -> None:
    case = make_case(MIXED, **SHAPES[name])
    found = run(case)
    reference.paged_attention(**case)
    tolerance = {torch.float32: 2e-5}.get(case["q"].dtype, 1e-2)
    torch.testing.assert_close(found, case["out"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_request_has_the_bits_it_has_alone_token_by_token(name: str, threads: int) -> None:
    case = make_case(MIXED, **SHAPES[name])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        starts = case["query_start_loc"].tolist()
        singles = []
        for i, (query_len, seq_len) in enumerate(MIXED):
            for j in range(query_len):
                one = dict(case)
                one["q"] = case["q"][starts[i] + j : starts[i] + j + 1].clone()
                one["out"] = torch.zeros_like(one["q"])
                one["slots"] = case["slots"][i : i + 1]
                one["query_start_loc"] = torch.tensor([0, 1], dtype=torch.int32)
                one["seq_lens"] = torch.tensor([seq_len - query_len + j + 1], dtype=torch.int32)
                singles.append(run(one))
        torch.set_num_threads(threads)
        assert torch.equal(run(case), torch.cat(singles))
        assert torch.equal(run(case, StepPlan(tiling=Tiling(4, 0))), torch.cat(singles))
    finally:
        torch.set_num_threads(before)


def test_a_plan_serves_other_layers_of_the_same_pool() -> None:
    case, plan = make_case(MIXED), StepPlan()
    assert torch.equal(run(case, plan), run(case))
    pool = case["k_cache"]._base
    other = {**case, "k_cache": pool[:, 2, 0], "v_cache": pool[:, 2, 1]}
    assert torch.equal(run(other, plan), run(other))


def test_bounded_memory_does_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(MIXED)
    expected = run(case)
    monkeypatch.setattr("quire_kernels.cpu.attention._CHUNK_BYTES", 50_000)
    monkeypatch.setattr("quire_kernels.cpu.plan._GROUP_BYTES", 300_000)
    plan = StepPlan()
    assert torch.equal(run(case, plan), expected)
    assert len(plan.attention[0].groups) > 4


def test_any_strides_are_accepted() -> None:
    case = make_case(MIXED)
    expected = run(case)
    for name in ("k_cache", "v_cache"):
        case[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(case), expected)
    fused = torch.cat((case["q"], case["q"]), dim=1)
    case["q"] = fused[:, : case["q"].shape[1]]
    assert torch.equal(run(case), expected)


def test_stale_keys_behind_the_sequence_are_not_seen() -> None:
    case = make_case([(1, 20), (3, 10)])
    expected = run(case)
    for slot, length in zip(case["slots"].tolist(), case["seq_lens"].tolist(), strict=True):
        block = int(case["block_table"][slot, length // 16])
        case["k_cache"][block, :, length % 16 :] = float("nan")
        case["v_cache"][block, :, length % 16 :] = 1e30
    assert torch.equal(run(case), expected)


def test_a_broken_row_stays_alone() -> None:
    case = make_case([(1, 40), (30, 40), (1, 7)])
    expected = run(case)
    case["q"][5] = float("nan")
    found = run(case)
    assert found[5].isnan().all()
    keep = [i for i in range(32) if i != 5]
    assert torch.equal(found[keep], expected[keep])


def test_empty_sequences_give_zeros_and_padding_is_left_alone() -> None:
    case = make_case([(1, 40), (1, 1), (2, 30)])
    case["seq_lens"][1] = 0
    case["q"] = torch.cat((case["q"], case["q"][:2]))
    case["out"] = torch.full_like(case["q"], 7.0)
    found = run(case)
    assert (found[1] == 0).all()
    assert (found[4:] == 7).all()
    assert not (found[[0, 2, 3]] == 0).any()
