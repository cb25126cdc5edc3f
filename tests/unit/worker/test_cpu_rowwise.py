"""CPU norms, activation, RoPE and linear layers: right, and row by row independent of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from quire_kernels import act, kv_write, norm
from quire_kernels.cpu import act as cpu_act
from quire_kernels.cpu import kv_write as cpu_kv_write
from quire_kernels.cpu import linear as cpu_linear
from quire_kernels.cpu import norm as cpu_norm
from quire_kernels.cpu.invariance import prove_linear
from quire_kernels.cpu.plan import StepPlan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [*range(1, 18), 31, 32, 33, 63, 64]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rows_alone(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Every row count, two places, one to three threads: the same bits. `prepare` is the start-up
    of a process with that many threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        prepare()
        expected = function(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            prepare()
            for count in (n for n in COUNTS if n <= len(x)):
                for at in (0, len(x) - count):
                    found = function(x[at : at + count].clone())
                    assert torch.equal(found, expected[at : at + count]), (threads, count, at)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_equal_the_reference(dtype: torch.dtype) -> None:
    x, residual, weight = noise(9, 200, dtype=dtype), noise(9, 200, dtype=dtype, seed=1), None
    weight = noise(200, dtype=dtype, seed=2)
    found, total = cpu_norm.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = norm.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(found, expected)
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 100, 256, 1024])
def test_norm_rows_are_independent(dtype: torch.dtype, size: int) -> None:
    weight = noise(size, dtype=dtype)
    assert_rows_alone(lambda x: cpu_norm.rms_norm(x, weight, 1e-6), noise(64, size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 160, 768])
def test_activation_equals_the_reference_and_rows_are_independent(
    dtype: torch.dtype, size: int
) -> None:
    x = 4 * noise(64, 2 * size, dtype=dtype)
    torch.testing.assert_close(cpu_act.silu_mul(x), act.silu_mul(x))
    assert_rows_alone(cpu_act.silu_mul, x)


def test_activation_survives_extreme_gates() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -1e38, 2.0, 2.0, 2.0, 2.0]])
    assert cpu_act.silu_mul(gate_up).tolist() == [[0.0, 400.0, 0.0, 0.0]]


def rope_case(count: int, dtype: torch.dtype, rotary_dim: int = 32) -> dict[str, torch.Tensor]:
    """Queries, keys and values as views of one fused projection; scattered places in a pool."""
    heads, kv_heads, head_dim = 4, 2, 32
    fused = noise(count, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=3)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    pool = torch.zeros(20, 3, 2, kv_heads, 16, head_dim, dtype=dtype)
    inverse = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    generator = torch.Generator().manual_seed(4)
    return {
        "q": q, "k": k, "v": v,
        "positions": torch.randint(0, 200, (count,), generator=generator),
        "cos_sin_cache": kv_write.build_cos_sin_cache(inverse, 200),
        "k_cache": pool[:, 1, 0], "v_cache": pool[:, 1, 1],
        "slot_mapping": torch.randperm(320, generator=generator)[:count],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_rope_and_write_equal_the_reference(
    dtype: torch.dtype, normed: bool, rotary_dim: int
) -> None:
    weights = {"q_norm": noise(32, dtype=dtype), "k_norm": noise(32, dtype=dtype, seed=9)}
    extra = weights if normed else {}
    ours, theirs = rope_case(12, dtype, rotary_dim), rope_case(12, dtype, rotary_dim)
    ours["slot_mapping"][3] = theirs["slot_mapping"][3] = -1
    before = ours["k"].clone(), ours["v"].clone()
    plan = StepPlan()
    cpu_kv_write.rope_kv_write(**ours, **extra, plan=plan)
    kv_write.rope_kv_write(**theirs, **extra)
    for name in ("q", "k_cache", "v_cache"):
        torch.testing.assert_close(ours[name], theirs[name])
    assert torch.equal(ours["k"], before[0])
    assert torch.equal(ours["v"], before[1])
    untouched = ours["k_cache"]._base[:, [0, 2]]
    assert (untouched == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rows_are_independent(dtype: torch.dtype) -> None:
    whole = rope_case(64, dtype)
    fused = torch.cat((whole["q"], whole["k"], whole["v"]), dim=1)
    at = {row.sum().item(): i for i, row in enumerate(fused.float())}

    def turned(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        i = torch.tensor([at[row.sum().item()] for row in x.float()])
        q, k, v = x.split((4, 2, 2), dim=1)
        case = {**whole, "q": q, "k": k, "v": v}
        case["positions"], case["slot_mapping"] = whole["positions"][i], whole["slot_mapping"][i]
        cpu_kv_write.rope_kv_write(**case)
        block, offset = case["slot_mapping"] // 16, case["slot_mapping"] % 16
        return torch.cat((q, whole["k_cache"][block, :, offset]), dim=1)

    assert_rows_alone(turned, fused)


def test_values_that_are_not_finite_never_reach_the_cache() -> None:
    case = rope_case(3, torch.float32)
    case["v"][1] = torch.tensor([float("nan"), float("inf")] * 16)
    cpu_kv_write.rope_kv_write(**case)
    assert case["v_cache"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 512), (3072, 256), (160, 64), (100, 37)])
@pytest.mark.parametrize("prepack", [True, False])
def test_linear_rows_are_independent_after_the_proof(
    dtype: torch.dtype, shape: tuple[int, int], prepack: bool
) -> None:
    in_features, out_features = shape
    weight = noise(out_features, in_features, dtype=dtype) / in_features**0.5
    bias = noise(out_features, dtype=dtype, seed=1)
    linear = cpu_linear.make_linear(weight, bias, prepack=prepack)

    def prove() -> None:
        linear.row_multiple, linear.row_block = prove_linear(linear, dtype)

    prove()
    x = noise(64, in_features, dtype=dtype, seed=2)
    expected = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(linear(x).float(), expected, atol=3e-2, rtol=2e-2)
    assert_rows_alone(linear, x, prove)


def test_linear_falls_back_where_torch_has_no_prepacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_pack", lambda weight: None)
    linear = cpu_linear.make_linear(noise(8, 16))
    assert not linear.packed
    assert linear(noise(5, 16)).shape == (5, 8)
