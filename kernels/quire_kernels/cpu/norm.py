"""RMSNorm, alone and fused with the residual addition, on a CPU.

Knows one row at a time. Contract and rounding: `quire_kernels.norm`. Rows are reduced over their
last, contiguous dimension, which torch does in one order for rows of fewer than 32,768 elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden] f32, f16 or bf16; weight [hidden] -> a new tensor like x."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)  # the same arithmetic in one call
    # rsqrt stays in f32: torch's bf16 version gives other bits in its scalar tail.
    wide = x.float()
    inverse = torch.mul(wide, wide).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return wide.mul_(inverse).to(x.dtype).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] -> (rms_norm(x + residual), x + residual); the sum is rounded to
    x's dtype first.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
