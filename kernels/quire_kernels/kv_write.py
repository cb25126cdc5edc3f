"""RoPE on queries and keys, and the write of K and V into the paged cache, in plain torch.

Knows no layers or models: the caller gives the angles as a table and the place of each token as a
number.

RoPE is the half-rotation of GPT-NeoX (element i pairs with i + rotary_dim / 2; Su et al., arXiv
2104.09864). Angles and products are f32 with one rounding at the end, so a stored key carries the
least error for its dtype.
"""

from __future__ import annotations

import torch

from quire_kernels.norm import rms_norm


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
) -> None:
    """Rotate `q` in place; write rotated k and plain v into the cache, leaving `k` and `v` alone.

    q                [num_tokens, num_heads, head_dim] f32, f16 or bf16; a view of fused QKV is fine
    k, v             [num_tokens, num_kv_heads, head_dim]
    positions        [num_tokens] int32 or int64
    cos_sin_cache    [max_position, rotary_dim] f32: cos of rotary_dim / 2 angles, then their sin;
                     elements of a head from rotary_dim on pass through
    k_cache, v_cache [num_blocks, num_kv_heads, block_size, head_dim], any strides
    slot_mapping     [num_tokens] int64, block_id * block_size + offset; negative = do not write
    q_norm, k_norm   [head_dim] or None: RMSNorm of each head before RoPE (Qwen3, arXiv 2505.09388)
    """
    block_size = k_cache.shape[2]
    queries = q if q_norm is None else rms_norm(q, q_norm, eps)
    keys = k if k_norm is None else rms_norm(k, k_norm, eps)
    cos_sin = cos_sin_cache[positions.long()]
    q.copy_(rotate(queries, cos_sin))
    keys = rotate(keys, cos_sin)

    kept = slot_mapping >= 0
    where = slot_mapping[kept]
    block, offset = where // block_size, where % block_size
    k_cache[block, :, offset] = keys[kept].to(k_cache.dtype)
    v_cache[block, :, offset] = v[kept].to(v_cache.dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [n, heads, head_dim], cos_sin f32 [n, rotary_dim] -> like x."""
    rotary_dim = cos_sin.shape[-1]
    half = rotary_dim // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half].float(), x[..., half:rotary_dim].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def build_cos_sin_cache(inv_freq: torch.Tensor, max_position: int) -> torch.Tensor:
    """inv_freq f32 [half] -> f32 [max_position, 2 * half], the table `rope_kv_write` reads."""
    positions = torch.arange(max_position, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.float()[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
