"""RMSNorm, alone and fused with the residual addition, in plain torch.

Knows one row at a time. Rounding follows transformers' LlamaRMSNorm exactly, so that a checkpoint
gives the logits it was trained to give: the variance is f32, and x * rsqrt is rounded to x's dtype
before the product with the weight. Source: Zhang and Sennrich, arXiv 1910.07467; transformers,
models/llama/modeling_llama.py.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden] f32, f16 or bf16; weight [hidden] -> a new tensor like x."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (weight * (wide * inverse).to(x.dtype)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] -> (rms_norm(x + residual), x + residual); the sum is rounded to
    x's dtype first.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
