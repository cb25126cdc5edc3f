"""Causal attention over a paged KV cache: what it computes, in plain torch.

Knows no layers, requests or schedules. This is the oracle for `gpu/attention.py` and
`cpu/attention.py`: it walks one request at a time and is meant to be read, not to be fast.

Paging follows PagedAttention (Kwon et al., arXiv 2309.06180). Prefill and decode are one case: a
request brings `query_len` new tokens at the end of a sequence of `seq_len` tokens, all of whose K
and V are in the cache already.
"""

from __future__ import annotations

import torch


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
) -> None:
    """Write softmax(scale * q k^T + mask) v into `out`; f32 inside, `out`'s dtype at the end.

    out, q           [num_tokens, num_heads, head_dim] f32, f16 or bf16
    k_cache, v_cache [num_blocks, num_kv_heads, block_size, head_dim], any strides
    block_table      [max_slots, max_blocks_per_slot] int32; the row of a request is its slot id
    slots            [num_reqs] int32
    query_start_loc  [num_reqs + 1] int32, rising; tokens of request i are [loc[i], loc[i + 1])
    seq_lens         [num_reqs] int32, KV length after this step; 0 gives zeros

    Query j of request i sits at position p = seq_lens[i] - query_len_i + j and sees the keys at (p
    - window, p], with window 0 meaning all (Mistral's sliding window, arXiv 2310.06825). Query head
    h reads KV head h // (H / G), the grouped-query attention of arXiv 2305.13245. `max_seq_len` and
    `fixed_tiles` only matter on a GPU.
    """
    del max_seq_len, fixed_tiles
    group = q.shape[1] // k_cache.shape[1]
    starts = query_start_loc.tolist()
    for i, (slot, seq_len) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True)):
        rows = slice(starts[i], starts[i + 1])
        query_len = starts[i + 1] - starts[i]
        if query_len == 0:
            continue
        if seq_len == 0:
            out[rows] = 0
            continue
        blocks = block_table[slot, : (seq_len + block_size - 1) // block_size].long()
        keys = _gather(k_cache, blocks, seq_len).repeat_interleave(group, dim=0)  # [H, seq_len, D]
        values = _gather(v_cache, blocks, seq_len).repeat_interleave(group, dim=0)
        queries = q[rows].float().transpose(0, 1)  # [H, query_len, D]

        position = torch.arange(seq_len - query_len, seq_len, device=q.device)[:, None]
        key_position = torch.arange(seq_len, device=q.device)[None, :]
        visible = key_position <= position
        if sliding_window > 0:
            visible &= key_position > position - sliding_window
        scores = (queries @ keys.transpose(1, 2)) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The first `seq_len` tokens of a request, f32 [num_kv_heads, seq_len, head_dim]."""
    picked = cache[blocks].float()  # [n, G, block_size, D]
    return picked.transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, :seq_len]
