"""The gated activation of Llama-style MLPs, in plain torch.

Knows nothing of the projections around it. SwiGLU: Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 * intermediate] (gate first, then up) -> [..., intermediate]; silu(gate) is rounded
    before the product, as in HF.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
