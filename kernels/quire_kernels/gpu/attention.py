"""Paged attention in Triton: one kernel for prefill and decode, with an optional split over the KV
length.

Knows one layer's cache view and one batch; contract in `quire_kernels/attention.py`.

Tiling. A program serves one KV head and a Q block: BLOCK_M rows that pack BLOCK_Q query tokens of
one request times the GROUP query heads of that KV head, so each K and V tile is read once for all
of them. Program p finds its request by bisection: Q blocks of request i start at query_start_loc[i]
// BLOCK_Q + i (the scheme of vLLM's unified kernel, arXiv 2511.11581). Softmax is the online one of
FlashAttention (arXiv 2205.14135), in base 2.

Order of sums. KV is cut at absolute positions into segments of SEGMENT tokens and those into tiles
of BLOCK_N. Each segment starts from an empty state and is merged into the total in rising order, by
the same arithmetic, whether one program walks all segments or one program per segment leaves its
state for the reduce kernel (FlashDecoding with a fixed segment size instead of a fixed number of
segments). Splitting is therefore only a matter of filling the device. Tiles a row cannot see leave
its state as it was. So a row's bits do not depend on its batch while BLOCK_M stays: `fixed_tiles`
pins it. Otherwise batches with many query tokens per request get wide Q blocks (another MMA
instruction, hence other bits anyway), never split, and those keep one running state: a second
accumulator would cost registers and spill on sm_80.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.common import ROUNDING, interpreted
from quire_kernels.gpu.tiles import Tiles, choose_tiles, device_limits, next_power_of_2


@triton.jit
def _find_request(query_start_loc, target, num_reqs, BLOCK_Q: tl.constexpr):
    """The last request whose first Q block (BLOCK_Q > 0) or first token (BLOCK_Q = 0) is not after
    `target`.
    """
    left = 0
    right = num_reqs
    while left < right:
        middle = (left + right) // 2
        start = tl.load(query_start_loc + middle)
        if BLOCK_Q > 0:
            start = start // BLOCK_Q + middle
        if start <= target:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def _merge_weights(total_max, segment_max):
    """The joint maximum, and the factors that bring both states to it; -inf: an empty state."""
    joint = tl.maximum(total_max, segment_max)
    base = tl.where(joint == float("-inf"), 0.0, joint)
    return joint, tl.exp2(total_max - base), tl.exp2(segment_max - base)


@triton.jit(do_not_specialize=["num_reqs", "num_segments"])
def attention_kernel(
    out,  # [num_tokens, num_heads, head_dim]
    partial,  # f32 [num_tokens, num_heads, num_segments, D_PAD]   (SPLIT only, as the next two)
    partial_max,  # f32 [num_tokens, num_heads, num_segments]
    partial_sum,  # f32 [num_tokens, num_heads, num_segments]
    q,
    k_cache,
    v_cache,
    block_table,
    slots,
    query_start_loc,
    seq_lens,
    scale,
    num_reqs,
    num_segments,
    stride_out_token,
    stride_out_head,
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's bf16 arithmetic is wrong: do everything in f32 there
):
    q_block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = _find_request(query_start_loc, q_block, num_reqs, BLOCK_Q)
    first_token = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - first_token
    local = (q_block - (first_token // BLOCK_Q + request)) * BLOCK_Q
    if local >= query_len:
        return
    seq_len = tl.load(seq_lens + request)
    table_row = block_table + tl.load(slots + request).to(tl.int64) * stride_table

    # Keys [begin, end) are those some row of this program sees.
    context = seq_len - query_len
    begin = 0
    end = context + tl.minimum(local + BLOCK_Q, query_len)
    if WINDOW > 0:
        begin = tl.maximum(context + local - WINDOW + 1, 0)
    segment = 0
    if SPLIT:
        segment = tl.program_id(2)
        begin = tl.maximum(begin, segment * SEGMENT)
        end = tl.minimum(end, (segment + 1) * SEGMENT)
        if begin >= end:
            return

    row = tl.arange(0, BLOCK_M)
    token = local + row // GROUP
    row_ok = (token < query_len) & (row < BLOCK_Q * GROUP)
    head = kv_head * GROUP + row % GROUP
    position = context + token
    out_token = (first_token + token).to(tl.int64)
    d = tl.arange(0, D_PAD)
    d_ok = d < HEAD_DIM
    q_at = q + out_token[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    queries = tl.load(q_at, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    scale_log2 = scale * 1.4426950408889634

    # State of the running segment, and of the segments merged so far.
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    total_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_s = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    for tile in range(begin // BLOCK_N, tl.cdiv(end, BLOCK_N)):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key_ok = key < end
        block = tl.load(table_row + key // BLOCK_SIZE, mask=key_ok, other=0).to(tl.int64)
        within = key % BLOCK_SIZE
        k_at = (
            k_cache
            + kv_head * stride_k_head
            + (block * stride_k_block + within * stride_k_token)[None, :]
        )
        v_at = (
            v_cache
            + kv_head * stride_v_head
            + (block * stride_v_block + within * stride_v_token)[:, None]
        )
        # Masked to zero: what lies past the sequence may be NaN, and 0 * NaN is NaN.
        keys = tl.load(k_at + d[:, None], mask=key_ok[None, :] & d_ok[:, None], other=0.0)
        values = tl.load(v_at + d[None, :], mask=key_ok[:, None] & d_ok[None, :], other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)

        scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)  # rows that have seen no key yet
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(m - base)
        s = s * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
        m = new_m
        if SEGMENT > 0 and not SPLIT:
            if (tile + 1) % (SEGMENT // BLOCK_N) == 0:
                total_m, a, b = _merge_weights(total_m, m)
                total_s = total_s * a + s * b
                total = total * a[:, None] + acc * b[:, None]
                m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                s = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    if SPLIT:
        place = (out_token * NUM_HEADS + head) * num_segments + segment
        tl.store(partial + place[:, None] * D_PAD + d[None, :], acc, mask=row_ok[:, None])
        tl.store(partial_max + place, m, mask=row_ok)
        tl.store(partial_sum + place, s, mask=row_ok)
    else:
        if SEGMENT > 0:
            total_m, a, b = _merge_weights(total_m, m)
            s = total_s * a + s * b
            acc = total * a[:, None] + acc * b[:, None]
        result = acc / tl.where(s == 0.0, 1.0, s)[:, None]
        out_at = (
            out
            + out_token[:, None] * stride_out_token
            + head[:, None] * stride_out_head
            + d[None, :]
        )
        tl.store(out_at, result.to(out.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


@triton.jit(do_not_specialize=["num_reqs", "num_segments"])
def reduce_kernel(
    out,
    partial,
    partial_max,
    partial_sum,
    query_start_loc,
    seq_lens,
    num_reqs,
    num_segments,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Merge the segments of one (token, head), in rising order."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(query_start_loc + num_reqs):
        return
    request = _find_request(query_start_loc, token, num_reqs, 0)
    position = tl.load(seq_lens + request) - tl.load(query_start_loc + request + 1) + token
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // SEGMENT

    d = tl.arange(0, D_PAD)
    base = (token.to(tl.int64) * NUM_HEADS + head) * num_segments
    total_m = tl.full([1], float("-inf"), tl.float32)
    total_s = tl.zeros([1], tl.float32)
    total = tl.zeros([D_PAD], tl.float32)
    for segment in range(first, (position + SEGMENT) // SEGMENT):
        place = base + segment
        total_m, a, b = _merge_weights(total_m, tl.load(partial_max + place))
        total_s = total_s * a + tl.load(partial_sum + place) * b
        total = total * a + tl.load(partial + place * D_PAD + d) * b
    result = total / tl.where(total_s == 0.0, 1.0, total_s)
    out_at = out + token.to(tl.int64) * stride_out_token + head * stride_out_head + d
    tl.store(out_at, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


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
    """The contract of `quire_kernels.attention.paged_attention`.

    `max_seq_len` bounds seq_lens from the host (default: what a block table row can hold); a tight
    one saves empty programs. Without `fixed_tiles` the Q block grows with the mean number of query
    tokens, so a row's last bit may depend on its batch.
    """
    bound = block_table.shape[1] * block_size if max_seq_len is None else max_seq_len
    multiprocessors, capability = device_limits(q.device)
    tiles = choose_tiles(
        q.shape[0],
        slots.shape[0],
        q.shape[1] // k_cache.shape[1],
        k_cache.shape[1],
        q.shape[2],
        q.element_size(),
        max_seq_len=bound,
        multiprocessors=multiprocessors,
        capability=capability,
        fixed_tiles=fixed_tiles,
    )
    batch = (block_table, slots, query_start_loc, seq_lens)
    launch(tiles, out, q, k_cache, v_cache, *batch, scale, sliding_window, block_size, bound)


def launch(
    tiles: Tiles,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
    block_size: int,
    max_seq_len: int,
) -> None:
    """Run with given tiles; waits for nothing, so it can be captured in a CUDA graph."""
    num_tokens, num_heads, head_dim = q.shape
    num_reqs, num_kv_heads = slots.shape[0], k_cache.shape[1]
    if k_cache.shape[2] != block_size:
        raise ValueError(
            f"block_size is {block_size} but the cache holds blocks of {k_cache.shape[2]} tokens"
        )
    if num_tokens == 0 or num_reqs == 0:
        return
    group, d_pad = num_heads // num_kv_heads, next_power_of_2(head_dim)
    block_q = tiles.block_m // group
    segments = max(1, -(-max_seq_len // tiles.segment)) if tiles.split else 1
    partial = partial_max = partial_sum = out  # not touched unless SPLIT
    if tiles.split:
        shape = (num_tokens, num_heads, segments)
        partial = torch.empty((*shape, d_pad), dtype=torch.float32, device=q.device)
        partial_max, partial_sum = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
    attention_kernel[(num_tokens // block_q + num_reqs, num_kv_heads, segments)](
        out,
        partial,
        partial_max,
        partial_sum,
        q,
        k_cache,
        v_cache,
        block_table,
        slots,
        query_start_loc,
        seq_lens,
        scale,
        num_reqs,
        segments,
        *out.stride()[:2],
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        D_PAD=d_pad,
        BLOCK_SIZE=block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_Q=block_q,
        BLOCK_N=tiles.block_n,
        SEGMENT=tiles.segment,
        WINDOW=sliding_window,
        SPLIT=tiles.split,
        UPCAST=interpreted(),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **ROUNDING,
    )
    if tiles.split:
        reduce_kernel[(num_tokens, num_heads)](
            out,
            partial,
            partial_max,
            partial_sum,
            query_start_loc,
            seq_lens,
            num_reqs,
            segments,
            *out.stride()[:2],
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            D_PAD=d_pad,
            SEGMENT=tiles.segment,
            WINDOW=sliding_window,
            num_warps=4,
            **ROUNDING,
        )
