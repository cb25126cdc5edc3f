"""A kernel that shows the noise mapping alone. In a file of its own: triton finds names in a
kernel's module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.sampling import _bits_to_gumbel


@triton.jit
def _convert(out, bits, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(out + at, _bits_to_gumbel(tl.load(bits + at).to(tl.uint32)))


def triton_noise(bits: torch.Tensor) -> torch.Tensor:
    """bits int64 [n] holding 32 bits, n a power of two -> f32 [n]."""
    out = torch.empty(bits.shape, dtype=torch.float32, device=bits.device)
    _convert[(1,)](out, bits, N=bits.shape[0], enable_fp_fusion=False)
    return out
