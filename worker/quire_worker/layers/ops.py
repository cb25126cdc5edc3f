"""The kernels of one device behind one set of names, so that the decoder has no branches.

Knows which backend serves which device and what each needs beside the contract: the CPU path keeps
a step's index tensors from layer to layer, the Triton path takes launch hints from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quire_kernels import dispatch
from quire_worker.layers.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class Ops:
    """Contracts: kernels/README.md."""

    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]
    rope_kv_write: Callable[..., None]
    paged_attention: Callable[..., None]
    write_extras: Callable[[AttentionMetadata], dict[str, Any]]
    attention_extras: Callable[[AttentionMetadata], dict[str, Any]]


def ops_for(device: torch.device) -> Ops:
    backend = dispatch.backend_for(device)
    names = ("rms_norm", "add_rms_norm", "silu_mul", "rope_kv_write", "paged_attention")
    kernels = {name: dispatch.resolve(name, backend) for name in names}
    if backend == "cpu":
        return Ops(**kernels, write_extras=_step_plan, attention_extras=_step_plan)
    return Ops(**kernels, write_extras=lambda attn: {}, attention_extras=_launch_hints)


def _step_plan(attn: AttentionMetadata) -> dict[str, Any]:
    return {"plan": attn.step_plan}


def _launch_hints(attn: AttentionMetadata) -> dict[str, Any]:
    return {"max_seq_len": attn.max_seq_len or None, "fixed_tiles": attn.fixed_tiles}
