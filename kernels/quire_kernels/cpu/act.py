"""The gated activation of Llama-style MLPs, on a CPU.

Knows nothing of the projections around it. Contract: `quire_kernels.act`. Written with exp because
torch's silu gives other bits in its scalar tail than in its vector code, and which elements fall in
the tail depends on the batch.
"""

from __future__ import annotations

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * intermediate] (gate first, then up) -> [..., intermediate]; silu(gate) is rounded
    before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    below = torch.neg(wide).exp_().add_(1.0)
    silu = torch.div(wide, below, out=below)
    return silu.to(gate_up.dtype).mul_(up)
