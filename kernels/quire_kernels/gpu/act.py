"""silu(gate) * up in Triton. Contract in `quire_kernels/act.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.common import ROUNDING

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(out, gate_up, stride_in, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    dtype = out.dtype.element_ty
    at = gate_up + row * stride_in + column
    gate = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=ok, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(dtype), mask=ok)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * intermediate] (gate first, then up) -> [..., intermediate]."""
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    rows = gate_up.reshape(-1, 2 * width)
    silu_mul_kernel[(rows.shape[0], triton.cdiv(width, _BLOCK))](
        out, rows, rows.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4, **ROUNDING
    )
    return out
