"""RoPE, per-head norms and the write of K and V into the paged cache, on a CPU.

Knows no layers or models. Contract: `quire_kernels.kv_write`. Only exact elementwise operations
(multiply, add), so rows do not depend on the batch; V is stripped of NaN and inf, because a masked
key's weight of 0 would not silence them.
"""

from __future__ import annotations

import torch

from quire_kernels.cpu.norm import rms_norm
from quire_kernels.cpu.plan import StepPlan, WritePlan, cache_rows, plan_write


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
    """Rotate `q` in place; write rotated k and plain v into the cache. Shapes:
    `quire_kernels.kv_write.rope_kv_write`.

    `plan` carries angles and cache rows from layer to layer of one step; None works them out for
    this call alone.
    """
    num_heads, head_dim, block_size = q.shape[1], q.shape[2], k_cache.shape[2]
    work = plan.write if plan is not None else None
    if work is None:
        work = plan_write(positions, cos_sin_cache, slot_mapping, k_cache, v_cache)
        if plan is not None:
            plan.write = work

    heads = _side_by_side(q, k)
    if q_norm is not None or k_norm is not None:
        queries = q if q_norm is None else rms_norm(q, q_norm, eps)
        keys = k if k_norm is None else rms_norm(k, k_norm, eps)
        heads = torch.cat((queries, keys), dim=1)
    turned = _rotate(heads, work)
    q.copy_(turned[:, :num_heads])
    keys, values = turned[:, num_heads:], torch.nan_to_num(v)
    if work.kept is not None:
        keys, values = keys.index_select(0, work.kept), values.index_select(0, work.kept)
    if work.regular:
        cache_rows(k_cache, head_dim).index_copy_(
            0, work.rows, keys.reshape(-1, head_dim).to(k_cache.dtype)
        )
        cache_rows(v_cache, head_dim).index_copy_(
            0, work.rows, values.reshape(-1, head_dim).to(v_cache.dtype)
        )
    else:
        where = slot_mapping[slot_mapping >= 0]
        block, offset = where // block_size, where % block_size
        k_cache[block, :, offset] = keys.to(k_cache.dtype)
        v_cache[block, :, offset] = values.to(v_cache.dtype)


def _side_by_side(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [n, H, D] and k [n, G, D] as one [n, H + G, D]: a view when k follows q in a fused QKV row,
    else a copy.
    """
    n, num_heads, head_dim = q.shape
    fused = (
        q.stride() == k.stride()
        and q.stride()[1:] == (head_dim, 1)
        and k.data_ptr() - q.data_ptr() == num_heads * head_dim * q.element_size()
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    )
    if fused:
        return q.as_strided((n, num_heads + k.shape[1], head_dim), q.stride(), q.storage_offset())
    return torch.cat((q, k), dim=1)


def _rotate(x: torch.Tensor, work: WritePlan) -> torch.Tensor:
    """x [n, heads, head_dim] -> a new tensor of x's dtype; products in f32, one rounding at the
    end.
    """
    rotary_dim = work.cos.shape[-1]
    part = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    wide = part if x.dtype == torch.float32 else part.float()
    half = rotary_dim // 2
    turned = (
        torch.cat((wide[..., half:], wide[..., :half]), dim=-1).mul_(work.sin).add_(wide * work.cos)
    )
    turned = turned.to(x.dtype)
    return turned if part is x else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
