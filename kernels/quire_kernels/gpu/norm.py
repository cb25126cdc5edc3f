"""RMSNorm in Triton, alone and with the residual addition; one program per row.

Contract in `quire_kernels/norm.py`. The tile is the whole row, so the order of a row's sum depends
on its width only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.common import ROUNDING, row_warps
from quire_kernels.gpu.tiles import next_power_of_2


@triton.jit
def rms_norm_kernel(
    out,
    total,  # where x + residual goes (HAS_RESIDUAL only)
    x,
    residual,
    weight,
    eps,
    stride_x,
    stride_residual,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < HIDDEN
    dtype = out.dtype.element_ty
    wide = tl.load(x + row * stride_x + column, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row * stride_residual + column, mask=ok, other=0.0).to(
            tl.float32
        )
        rounded = wide.to(dtype)  # the sum lives on in this dtype, so the norm sees it so
        tl.store(total + row * HIDDEN + column, rounded, mask=ok)
        wide = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    normed = (wide * inverse).to(dtype).to(tl.float32)
    scaled = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32) * normed
    tl.store(out + row * HIDDEN + column, scaled.to(dtype), mask=ok)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden], weight [hidden] -> a new contiguous tensor like x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, out, x, x, weight, eps, has_residual=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] -> (rms_norm(x + residual), x + residual), new and contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(out, total, x, residual, weight, eps, has_residual=True)
    return out, total


def _launch(
    out: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    has_residual: bool,
) -> None:
    hidden = x.shape[-1]
    if x.numel() == 0:
        return
    x, residual = x.reshape(-1, hidden), residual.reshape(-1, hidden)
    block = next_power_of_2(hidden)
    rms_norm_kernel[(x.shape[0],)](
        out,
        total,
        x,
        residual,
        weight,
        eps,
        x.stride(0),
        residual.stride(0),
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=has_residual,
        num_warps=row_warps(block),
        **ROUNDING,
    )
