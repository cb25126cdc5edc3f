"""The index tensors of one step: what every layer's attention and cache write would otherwise work
out again.

Knows the step's columns and the cache's layout; nothing of layers or values. A plan is valid for
the tensors it was made from and for every layer of one pool (layers differ only by a storage
offset, which indices here leave out).

Attention work is cut into pairs (query tile, KV tile). A query tile is a run of consecutive query
tokens of one request, of one of two fixed sizes: one token (decode rows, tails) or `large_tokens`
(prefill). A KV tile is `tile_tokens` keys at an absolute position. Both sizes give equal bits
(`invariance.py` proves it), so how a request is cut is free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

# Keys per tile, rounded to whole blocks: small for short contexts, large enough for the GEMM.
_KV_TILE = 64
_GROUP_BYTES = 48 << 20  # scores + queries + partial outputs alive at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """How query rows may be cut so that bits stay equal; found by `invariance.prove_attention`."""

    row_multiple: int = 4  # a matrix product of fewer rows adds up in another order
    large_rows: int = 64  # rows of a prefill item; 0 = only one-token items


@dataclass(slots=True)
class TileGroup:
    """Query tiles of one size whose pairs fit in memory together. T = keys per tile, G = KV heads.

    Tiles are sorted by their number of KV tiles, falling; pairs by step (a tile's first, second,
    ... KV tile), then by tile. So the tiles still busy at step s are the first `counts[s]`, and
    step s is one slice of the pairs.
    """

    num_tiles: int
    rows: int  # query rows per (tile, KV head), a multiple of Tiling.row_multiple
    counts: list[int]  # [num_steps]
    q_index: torch.Tensor  # int64 [num_pairs * G * rows], row token * H + head of the queries
    blocks: torch.Tensor  # int64 [num_pairs, G, blocks_per_tile], block ids (repeated over G)
    edge: (
        torch.Tensor | None
    )  # int64 [num_edge] pairs with a hidden key; None = treat all pairs as such
    hidden: torch.Tensor  # bool [num_edge, 1, rows, T], True where the key may not be seen
    tile_of_pair: torch.Tensor  # int64 [num_pairs]
    pair_grid: (
        torch.Tensor
    )  # int64 [num_steps * num_tiles], pair of (step, tile); a tile's first where it has none


@dataclass(slots=True)
class AttentionPlan:
    groups: list[TileGroup]
    out_index: torch.Tensor  # int64 [num_tokens * H], row of the stacked group outputs
    num_tokens: int
    blank: bool  # some tokens belong to a request of length 0 and stay zero
    tile_tokens: int
    row_index: dict[
        tuple[int, int], list[torch.Tensor]
    ]  # (rows per block, rows per head) -> one index per group


@dataclass(slots=True)
class WritePlan:
    cos: torch.Tensor  # f32 [num_tokens, 1, rotary_dim], the half-angle cosines twice
    sin: torch.Tensor  # f32 [num_tokens, 1, rotary_dim], minus the sines, then the sines
    regular: bool  # the cache is rows of head_dim elements, so that `rows` can be used
    rows: torch.Tensor  # int64 [num_kept * G], row of head_dim elements from the layer's offset on
    kept: torch.Tensor | None  # int64 [num_kept] tokens to write; None = all


@dataclass(slots=True)
class StepPlan:
    """Filled by the first layer that runs, reused by the rest of the same step."""

    tiling: Tiling = Tiling()
    attention: dict[int, AttentionPlan] = field(default_factory=dict)  # by sliding window
    write: WritePlan | None = None


def plan_attention(
    block_table: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int = 0,
    tiling: Tiling | None = None,
) -> AttentionPlan:
    """Shapes as in `quire_kernels.attention.paged_attention`."""
    tiling = tiling or Tiling()
    table, loc = block_table.numpy(), query_start_loc.numpy().astype(np.int64)
    lens, slot_ids = seq_lens.numpy().astype(np.int64), slots.numpy().astype(np.int64)
    query_lens = np.diff(loc)
    live = (query_lens > 0) & (lens > 0)
    group = num_heads // num_kv_heads
    tile_tokens = tile_tokens_for(block_size)
    blocks_per_tile = tile_tokens // block_size
    heads = np.arange(num_kv_heads)

    out_index = np.zeros((int(loc[-1]), num_heads), np.int64)
    groups: list[TileGroup] = []
    base = 0
    for size, owner, first in _query_tiles(np.where(live, query_lens, 0), group, tiling):
        count = np.minimum(size, query_lens[owner] - first)
        first_pos = lens[owner] - query_lens[owner] + first
        last_pos = first_pos + count - 1
        lowest = (
            np.maximum(first_pos - sliding_window + 1, 0)
            if sliding_window
            else np.zeros_like(first)
        )
        kv_first = lowest // tile_tokens
        steps = last_pos // tile_tokens - kv_first + 1
        rows = -(-size * group // tiling.row_multiple) * tiling.row_multiple
        pair_bytes = 4 * num_kv_heads * rows * (tile_tokens + 2 * head_dim)

        order = np.argsort(-steps, kind="stable")
        bounds = np.cumsum(steps[order]) * pair_bytes // _GROUP_BYTES
        for chosen in np.split(order, np.flatnonzero(np.diff(bounds)) + 1):
            n = steps[chosen]
            counts = [int((n > s).sum()) for s in range(int(n[0]))]
            step = np.repeat(np.arange(len(counts)), counts)
            tile = np.concatenate([np.arange(c) for c in counts])
            kv_tile = kv_first[chosen][tile] + step

            # A padding row repeats the last real one: it costs nothing extra and is always finite.
            row_token = np.minimum(np.arange(rows) // group, size - 1)
            row_head = np.arange(rows) % group
            offset = np.minimum(row_token, count[chosen][:, None] - 1)  # [tiles, rows]
            token = (loc[owner] + first)[chosen][:, None] + offset
            position = first_pos[chosen][:, None] + offset
            q_index = (
                (token * num_heads)[:, None, :] + (heads * group)[:, None] + row_head
            )  # [tiles, G, rows]
            out_index.reshape(-1)[q_index] = base + np.arange(q_index.size).reshape(q_index.shape)
            base += q_index.size

            key = kv_tile[:, None] * tile_tokens + np.arange(tile_tokens)  # [pairs, T]
            hidden = key[:, None, :] > position[tile][:, :, None]
            if sliding_window:
                hidden |= key[:, None, :] <= position[tile][:, :, None] - sliding_window
            edge = np.flatnonzero(hidden.any(axis=(1, 2)))
            few = (
                edge.size * 2 < tile.size
            )  # below that, masking a copy is cheaper than masking everything

            # Entries past the sequence may be anything; its own last block stands in, and is
            # masked.
            column = kv_tile[:, None] * blocks_per_tile + np.arange(blocks_per_tile)
            column = np.minimum(column, (last_pos[chosen] // block_size)[tile][:, None])
            ids = table[slot_ids[owner[chosen]][tile][:, None], column].astype(np.int64)

            starts = np.cumsum([0, *counts[:-1]])[:, None]
            tiles = np.arange(len(chosen))
            grid = np.where(tiles < np.array(counts)[:, None], starts + tiles, tiles)
            groups.append(
                TileGroup(
                    num_tiles=len(chosen),
                    rows=rows,
                    counts=counts,
                    q_index=torch.from_numpy(q_index[tile].reshape(-1)),
                    blocks=torch.from_numpy(np.repeat(ids[:, None, :], num_kv_heads, axis=1)),
                    edge=torch.from_numpy(edge) if few else None,
                    hidden=torch.from_numpy(hidden[edge][:, None] if few else hidden[:, None]),
                    tile_of_pair=torch.from_numpy(tile),
                    pair_grid=torch.from_numpy(grid.reshape(-1)),
                )
            )
    return AttentionPlan(
        groups=groups,
        out_index=torch.from_numpy(out_index.reshape(-1)),
        num_tokens=int(loc[-1]),
        blank=bool(((query_lens > 0) & ~live).any()),
        tile_tokens=tile_tokens,
        row_index={},
    )


def plan_write(
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> WritePlan:
    """Shapes as in `quire_kernels.kv_write.rope_kv_write`."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    per_block, per_head, per_token, step = k_cache.stride()
    regular = (
        k_cache.stride() == v_cache.stride()
        and (per_token, step) == (head_dim, 1)
        and per_block % head_dim == per_head % head_dim == 0
    )
    cos_sin = cos_sin_cache.index_select(0, positions.long())
    cos, sin = cos_sin.chunk(2, dim=-1)
    kept = None
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = torch.nonzero(slot_mapping >= 0).flatten()
        slot_mapping = slot_mapping.index_select(0, kept)
    where = slot_mapping.long()
    block = torch.div(where, block_size, rounding_mode="floor")
    first = block * (per_block // head_dim) + where % block_size
    rows = first[:, None] + torch.arange(num_kv_heads) * (per_head // head_dim)
    return WritePlan(
        cos=torch.cat((cos, cos), dim=-1).unsqueeze(1),
        sin=torch.cat((-sin, sin), dim=-1).unsqueeze(1),
        regular=regular,
        rows=rows.reshape(-1),
        kept=kept,
    )


def tile_tokens_for(block_size: int) -> int:
    """Keys per KV tile: whole blocks."""
    return max(1, _KV_TILE // block_size) * block_size


def large_query_tokens(group: int, tiling: Tiling) -> int:
    """Query tokens of a prefill item, for `group` query heads a KV head; 0 = no such items."""
    return max(4, tiling.large_rows // group // 4 * 4) if tiling.large_rows else 0


def cache_rows(cache: torch.Tensor, width: int) -> torch.Tensor:
    """A layer's view of the pool [num_blocks, G, block_size, D] -> the memory from its offset on,
    as [rows, width].
    """
    (a, b, c, d), (w, x, y, z) = cache.shape, cache.stride()
    span = (a - 1) * w + (b - 1) * x + (c - 1) * y + (d - 1) * z + 1
    return cache.as_strided((span // width, width), (width, 1), cache.storage_offset())


def _query_tiles(
    query_lens: np.ndarray, group: int, tiling: Tiling
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """[(tokens per tile, owner [tiles], first token within the owner [tiles])] covering every query
    token once.
    """
    large = large_query_tokens(group, tiling)
    if large:
        # A tail of a few tokens is cheaper one by one: a large item computes all its rows.
        num_large = query_lens // large + (query_lens % large >= max(3, large // 8))
    else:
        num_large = np.zeros_like(query_lens)
    covered = np.minimum(num_large * large, query_lens)
    found = []
    owner, index = _ragged(num_large)
    if owner.size:
        found.append((large, owner, index * large))
    owner, index = _ragged(query_lens - covered)
    if owner.size:
        found.append((1, owner, covered[owner] + index))
    return found


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """counts [n] -> (owner, index within the owner), both [sum(counts)]."""
    owner = np.repeat(np.arange(counts.size), counts)
    return owner, np.arange(owner.size) - (np.cumsum(counts) - counts)[owner]
