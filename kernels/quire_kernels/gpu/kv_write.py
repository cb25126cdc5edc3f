"""RoPE and the KV cache write as one Triton kernel, with an optional RMSNorm of each head.

Knows one layer's cache view; contract in `quire_kernels/kv_write.py`. One launch serves Q, K and V,
since at decode each launch costs about as much as the work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.common import ROUNDING
from quire_kernels.gpu.tiles import next_power_of_2

_HEADS_PER_PROGRAM = 8


@triton.jit
def _turn_heads(
    source,  # pointers [heads, 1] to element 0 of each head
    target,
    head_ok,  # [heads, 1]
    cos,  # [1, HALF_PAD]
    sin,
    norm,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Norm and rotate some heads from `source` to `target`; they may be the same."""
    half = tl.arange(0, HALF_PAD)[None, :]
    half_ok = head_ok & (half < ROTARY // 2)
    dtype = source.dtype.element_ty
    first = tl.load(source + half, mask=half_ok, other=0.0).to(tl.float32)
    second = tl.load(source + half + ROTARY // 2, mask=half_ok, other=0.0).to(tl.float32)
    if TAIL_PAD > 0:
        tail = ROTARY + tl.arange(0, TAIL_PAD)[None, :]
        tail_ok = head_ok & (tail < HEAD_DIM)
        rest = tl.load(source + tail, mask=tail_ok, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, 1)
        if TAIL_PAD > 0:
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight1 = tl.load(norm + half, mask=half < ROTARY // 2, other=0.0).to(tl.float32)
        weight2 = tl.load(norm + half + ROTARY // 2, mask=half < ROTARY // 2, other=0.0).to(
            tl.float32
        )
        first = (weight1 * (first * inverse).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = (weight2 * (second * inverse).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        if TAIL_PAD > 0:
            weight3 = tl.load(norm + tail, mask=tail < HEAD_DIM, other=0.0).to(tl.float32)
            rest = weight3 * (rest * inverse).to(dtype).to(tl.float32)
    to = target.dtype.element_ty
    tl.store(target + half, (first * cos - second * sin).to(to), mask=half_ok)
    tl.store(target + half + ROTARY // 2, (second * cos + first * sin).to(to), mask=half_ok)
    if TAIL_PAD > 0:
        tl.store(target + tail, rest.to(to), mask=tail_ok)


@triton.jit
def rope_kv_write_kernel(
    q,
    k,
    v,
    positions,
    cos_sin,  # f32 [max_position, ROTARY]
    k_cache,
    v_cache,
    slot_mapping,
    q_norm,
    k_norm,
    eps,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cos_sin,
    stride_kc_block,
    stride_kc_head,
    stride_kc_token,
    stride_vc_block,
    stride_vc_head,
    stride_vc_token,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    half = tl.arange(0, HALF_PAD)[None, :]
    angle = cos_sin + tl.load(positions + token).to(tl.int64) * stride_cos_sin + half
    cos = tl.load(angle, mask=half < ROTARY // 2, other=0.0)
    sin = tl.load(angle + ROTARY // 2, mask=half < ROTARY // 2, other=0.0)

    Q_TILES: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    if tile < Q_TILES:
        head = tile * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        at = q + token * stride_q_token + head * stride_q_head
        _turn_heads(
            at,
            at,
            head < NUM_HEADS,
            cos,
            sin,
            q_norm,
            eps,
            HEAD_DIM,
            ROTARY,
            HALF_PAD,
            TAIL_PAD,
            HAS_Q_NORM,
        )
    else:
        where = tl.load(slot_mapping + token)
        if where >= 0:
            head = (tile - Q_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            head_ok = head < NUM_KV_HEADS
            block = where // BLOCK_SIZE
            within = where % BLOCK_SIZE
            k_to = (
                k_cache + block * stride_kc_block + within * stride_kc_token + head * stride_kc_head
            )
            v_to = (
                v_cache + block * stride_vc_block + within * stride_vc_token + head * stride_vc_head
            )
            k_at = k + token * stride_k_token + head * stride_k_head
            _turn_heads(
                k_at,
                k_to,
                head_ok,
                cos,
                sin,
                k_norm,
                eps,
                HEAD_DIM,
                ROTARY,
                HALF_PAD,
                TAIL_PAD,
                HAS_K_NORM,
            )
            d = tl.arange(0, D_PAD)[None, :]
            value = tl.load(
                v + token * stride_v_token + head * stride_v_head + d, mask=head_ok & (d < HEAD_DIM)
            )
            tl.store(v_to + d, value.to(v_cache.dtype.element_ty), mask=head_ok & (d < HEAD_DIM))


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
    """The contract of `quire_kernels.kv_write.rope_kv_write`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0:
        return
    rotary = cos_sin_cache.shape[1]
    tail = head_dim - rotary
    block_h = min(_HEADS_PER_PROGRAM, next_power_of_2(max(num_heads, num_kv_heads)))
    programs = triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h)
    rope_kv_write_kernel[(num_tokens, programs)](
        q,
        k,
        v,
        positions,
        cos_sin_cache,
        k_cache,
        v_cache,
        slot_mapping,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos_sin_cache.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        D_PAD=next_power_of_2(head_dim),
        ROTARY=rotary,
        HALF_PAD=next_power_of_2(rotary // 2),
        TAIL_PAD=next_power_of_2(tail) if tail else 0,
        BLOCK_SIZE=k_cache.shape[2],
        BLOCK_H=block_h,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        num_warps=4,
        **ROUNDING,
    )
