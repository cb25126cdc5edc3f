"""Paged attention on a CPU: fixed KV tiles at absolute positions, one code path for decode and
prefill rows.

Knows tensors and the step's index tensors (`plan.py`); no requests, no layers. Contract:
`quire_kernels.attention`.

For each (query tile, KV tile): scores = q k^T in f32; the maximum over a query's tiles (exact in
any order); weights = exp(score - maximum); partial sums per tile; then the tiles are added in
absolute order. Nothing in a query row's arithmetic depends on other rows, so its bits are the same
in any batch (README.md says what that takes).
"""

from __future__ import annotations

import torch

from quire_kernels.cpu.plan import AttentionPlan, StepPlan, TileGroup, cache_rows, plan_attention

_CHUNK_BYTES = 4 << 20  # gathered keys alive at once: stays in cache between gather and product


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
    block_size: int | None = None,
    plan: StepPlan | None = None,
) -> None:
    """Write softmax(scale * q k^T + mask) v into `out`. Shapes and meaning:
    `quire_kernels.attention.paged_attention`.

    `plan` carries index tensors from layer to layer of one step; None works them out for this call
    alone.
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    work = plan.attention.get(sliding_window) if plan is not None else None
    if work is None:
        work = plan_attention(
            block_table,
            slots,
            query_start_loc,
            seq_lens,
            block_size=block_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sliding_window=sliding_window,
            tiling=plan.tiling if plan is not None else None,
        )
        if plan is not None:
            plan.attention[sliding_window] = work
    tokens = work.num_tokens
    if not work.groups:
        out[:tokens] = 0
        return

    queries = q if tokens == q.shape[0] else q[:tokens]
    queries = (queries.float() * scale).reshape(tokens * num_heads, head_dim)
    parts = [_attend(work, i, queries, k_cache, v_cache) for i in range(len(work.groups))]
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
    result = stacked.index_select(0, work.out_index).view(tokens, num_heads, head_dim)
    target = out if tokens == out.shape[0] else out[:tokens]
    target.copy_(result)
    if work.blank:
        lens = query_start_loc.long().diff()
        target[torch.repeat_interleave(seq_lens == 0, lens)] = 0


def _attend(
    plan: AttentionPlan,
    number: int,
    queries: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """One group -> f32 [num_tiles * G * rows, head_dim]."""
    group, tile_tokens, head_dim = plan.groups[number], plan.tile_tokens, queries.shape[1]
    num_kv_heads, rows = k_cache.shape[1], group.rows
    num_pairs = group.tile_of_pair.shape[0]
    items = num_pairs * num_kv_heads
    stride = max(1, _CHUNK_BYTES // (4 * num_kv_heads * tile_tokens * head_dim))
    chunks = [(a, min(a + stride, num_pairs)) for a in range(0, num_pairs, stride)]

    picked = queries.index_select(0, group.q_index).view(items, rows, head_dim)
    if len(chunks) == 1:
        scores = torch.bmm(picked, _gather(plan, number, k_cache, 0, num_pairs).transpose(1, 2))
    else:
        scores = queries.new_empty(items, rows, tile_tokens)
        for a, b in chunks:
            keys = _gather(plan, number, k_cache, a, b)
            span = slice(a * num_kv_heads, b * num_kv_heads)
            torch.bmm(picked[span], keys.transpose(1, 2), out=scores[span])
    by_pair = scores.view(num_pairs, num_kv_heads, rows, tile_tokens)
    if group.edge is None:
        by_pair.masked_fill_(group.hidden, float("-inf"))
    else:
        masked = by_pair.index_select(0, group.edge).masked_fill_(group.hidden, float("-inf"))
        by_pair.index_copy_(0, group.edge, masked)

    top = scores.amax(dim=-1)
    steps = len(group.counts)
    if steps > 1:
        flat = top.view(num_pairs, num_kv_heads * rows)
        per_tile = (
            flat.index_select(0, group.pair_grid).view(steps, group.num_tiles, -1).amax(dim=0)
        )
        top = per_tile.index_select(0, group.tile_of_pair).view(items, rows)
    weights = scores.sub_(top.unsqueeze(-1)).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if len(chunks) == 1:
        partial = torch.bmm(weights, _gather(plan, number, v_cache, 0, num_pairs))
    else:
        partial = picked  # its queries are used up, and the shape is the same
        for a, b in chunks:
            values = _gather(plan, number, v_cache, a, b)
            span = slice(a * num_kv_heads, b * num_kv_heads)
            torch.bmm(weights[span], values, out=partial[span])
    if steps > 1:
        total = _add_steps(total, group, num_kv_heads)
        partial = _add_steps(partial, group, num_kv_heads)
    return partial.div_(total).view(-1, head_dim)


def _add_steps(pairs: torch.Tensor, group: TileGroup, num_kv_heads: int) -> torch.Tensor:
    """[num_pairs * G, rows, n] -> [num_tiles * G, rows, n], one tile after another in absolute
    order; in place.
    """
    at = group.num_tiles * num_kv_heads
    result = pairs[:at]
    for count in group.counts[1:]:
        n = count * num_kv_heads
        result[:n] += pairs[at : at + n]
        at += n
    return result


def _gather(plan: AttentionPlan, number: int, cache: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """The KV tiles of pairs [a, b) -> f32 [(b - a) * G, tile_tokens, head_dim]."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    blocks = plan.groups[number].blocks
    record = block_size * head_dim
    per_block, per_head = cache.stride(0), cache.stride(1)
    if (
        cache.stride(3) == 1
        and cache.stride(2) == head_dim
        and per_block % record == per_head % record == 0
    ):
        # A (block, head) is one contiguous record of the pool, so a layer is rows of a matrix that
        # starts at its offset.
        key = (per_block // record, per_head // record)
        if key not in plan.row_index:
            heads = torch.arange(num_kv_heads)[:, None] * key[1]
            plan.row_index[key] = [(g.blocks * key[0] + heads).reshape(-1) for g in plan.groups]
        per_pair = blocks.shape[1] * blocks.shape[2]
        index = plan.row_index[key][number]
        if b - a < blocks.shape[0]:
            index = index[a * per_pair : b * per_pair]
        tiles = cache_rows(cache, record).index_select(0, index)
    else:
        tiles = cache[blocks[a:b], torch.arange(num_kv_heads)[:, None]]
    return tiles.view(-1, plan.tile_tokens, head_dim).float()
