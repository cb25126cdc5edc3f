"""Which implementation serves an op: by device, from one lazy table.

Knows names only; a backend's module is imported when its op is first called, so a CPU install needs
no triton. Backends: "triton" (gpu/), "cpu" (cpu/), "reference" (the torch function beside the
contract).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quire_kernels.cpu.plan import StepPlan
    from quire_kernels.logits import Penalties

# op -> backend -> (module under quire_kernels, function)
OPS: dict[str, dict[str, tuple[str, str]]] = {
    "paged_attention": {
        "triton": ("gpu.attention", "paged_attention"),
        "cpu": ("cpu.attention", "paged_attention"),
        "reference": ("attention", "paged_attention"),
    },
    "rope_kv_write": {
        "triton": ("gpu.kv_write", "rope_kv_write"),
        "cpu": ("cpu.kv_write", "rope_kv_write"),
        "reference": ("kv_write", "rope_kv_write"),
    },
    "rms_norm": {
        "triton": ("gpu.norm", "rms_norm"),
        "cpu": ("cpu.norm", "rms_norm"),
        "reference": ("norm", "rms_norm"),
    },
    "add_rms_norm": {
        "triton": ("gpu.norm", "add_rms_norm"),
        "cpu": ("cpu.norm", "add_rms_norm"),
        "reference": ("norm", "add_rms_norm"),
    },
    "silu_mul": {
        "triton": ("gpu.act", "silu_mul"),
        "cpu": ("cpu.act", "silu_mul"),
        "reference": ("act", "silu_mul"),
    },
    "sample": {
        "triton": ("gpu.sampling", "sample"),
        "cpu": ("sampling", "sample"),
        "reference": ("sampling", "sample"),
    },
    "process_logits": {
        "triton": ("logits", "process_logits"),
        "cpu": ("logits", "process_logits"),
        "reference": ("logits", "process_logits"),
    },
}


def backend_for(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpu"


@functools.cache
def resolve(op: str, backend: str) -> Callable[..., Any]:
    """The function that serves `op` on `backend`; KeyError with the known names otherwise."""
    if op not in OPS:
        raise KeyError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    if backend not in OPS[op]:
        raise KeyError(f"op {op!r} has no backend {backend!r}; it has: {', '.join(OPS[op])}")
    module, function = OPS[op][backend]
    return getattr(importlib.import_module(f"quire_kernels.{module}"), function)


def paged_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    block_size: int,
    max_seq_len: int | None = None,
    fixed_tiles: bool = False,
    plan: StepPlan | None = None,
) -> None:
    """See `quire_kernels.attention.paged_attention`; `plan` keeps index tensors of a step (CPU)."""
    backend = backend_for(q.device)
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window}
    if backend == "triton":
        options |= {"max_seq_len": max_seq_len, "fixed_tiles": fixed_tiles}
    else:
        options["plan"] = plan
    batch = (block_table, slots, query_start_loc, seq_lens)
    serve = resolve("paged_attention", backend)
    serve(out, q, k_cache, v_cache, *batch, block_size=block_size, **options)


def rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    plan: StepPlan | None = None,
) -> None:
    """See `quire_kernels.kv_write.rope_kv_write`; `plan` as in `paged_attention`."""
    backend = backend_for(q.device)
    options: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
    if backend != "triton":
        options["plan"] = plan
    cache = (k_cache, v_cache, slot_mapping)
    resolve("rope_kv_write", backend)(q, k, v, positions, cos_sin_cache, *cache, **options)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `quire_kernels.norm.rms_norm`."""
    return resolve("rms_norm", backend_for(x.device))(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire_kernels.norm.add_rms_norm`."""
    return resolve("add_rms_norm", backend_for(x.device))(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `quire_kernels.act.silu_mul`."""
    return resolve("silu_mul", backend_for(gate_up.device))(gate_up)


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    stream: int = 0,
) -> torch.Tensor:
    """See `quire_kernels.sampling.sample`."""
    serve = resolve("sample", backend_for(logits.device))
    return serve(logits, seeds, positions, temperatures, stream=stream)


def process_logits(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    penalties: Penalties | None = None,
) -> torch.Tensor:
    """See `quire_kernels.logits.process_logits`."""
    serve = resolve("process_logits", backend_for(logits.device))
    return serve(logits, temperatures, top_k=top_k, top_p=top_p, min_p=min_p, penalties=penalties)
