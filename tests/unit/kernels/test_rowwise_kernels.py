"""Norms and activation: references against transformers' formulas, Triton (interpreted) against the
references.
"""

from __future__ import annotations

import pytest
import torch

from quire_kernels import act, norm
from unit.kernels.kernel_cases import TOLERANCE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_rms_norm_rounds_before_the_weight_as_transformers_does() -> None:
    x, weight = rand(3, 64, dtype=torch.bfloat16), rand(64, dtype=torch.bfloat16)
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5), weight * wide.to(torch.bfloat16))


def test_add_rms_norm_is_the_two_steps() -> None:
    x, weight = rand(2, 3, 48, dtype=torch.bfloat16), rand(48, dtype=torch.bfloat16)
    normed, total = norm.add_rms_norm(x, x * 2, weight, 1e-6)
    assert torch.equal(total, x + x * 2)
    assert torch.equal(normed, norm.rms_norm(x + x * 2, weight, 1e-6))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 2, 100)])
def test_triton_norms_equal_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from quire_kernels.gpu import norm as triton_norm

    x, residual = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype).flip(0)
    weight = rand(shape[-1], dtype=dtype)
    limit = TOLERANCE[dtype]
    got, want = triton_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, want, atol=limit, rtol=limit)
    got, total = triton_norm.add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = norm.add_rms_norm(x, residual, weight, 1e-6)
    # The interpreter cuts off when it casts to bf16; a GPU rounds, and tests/gpu asks for equality.
    torch.testing.assert_close(
        total, want_total, atol=0, rtol=0 if dtype != torch.bfloat16 else limit
    )
    torch.testing.assert_close(got, want, atol=limit, rtol=limit)


@pytest.mark.usefixtures("interpreter")
def test_triton_norm_reads_a_strided_row() -> None:
    from quire_kernels.gpu import norm as triton_norm

    x, weight = rand(4, 96, dtype=torch.float32)[:, :64], rand(64, dtype=torch.float32)
    torch.testing.assert_close(
        triton_norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6)
    )


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1100])
def test_triton_silu_mul_equals_reference(width: int, dtype: torch.dtype) -> None:
    from quire_kernels.gpu.act import silu_mul

    gate_up = rand(3, 2 * width, dtype=dtype) * 4
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(silu_mul(gate_up), act.silu_mul(gate_up), atol=limit, rtol=limit)
