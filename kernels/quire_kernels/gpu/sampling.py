"""Position-keyed sampling in Triton: Philox, Gumbel noise and argmax over vocabulary tiles, then
over tiles.

Contract and the meaning of the noise in `quire_kernels/sampling.py`. Maximum and lowest id do not
depend on any order, so a row's token depends on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire_kernels.gpu.common import ROUNDING
from quire_kernels.gpu.tiles import next_power_of_2

_TILE = 4096


@triton.jit
def _bits_to_gumbel(bits):
    """uint32 -> f32 noise for u = (k + 1/2) * 2^-24, k = bits >> 8, without ever rounding u to 1.

    Below one half u is exact in f32. Above, 1 - u is, and -log(1 - w) = 2 atanh(w / (2 - w)) by its
    series: s <= 1/3, and seven terms reach f32 precision relative to the result, which is what the
    upper tail of the noise needs.
    """
    k = (bits >> 8).to(tl.int32)
    upper = k >= 8388608
    u = (tl.where(upper, 16777215 - k, k).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    s = u / (2.0 - u)
    s2 = s * s
    series = 1.0 / 13 + s2 * (1.0 / 15)
    series = 1.0 / 11 + s2 * series
    series = 1.0 / 9 + s2 * series
    series = 1.0 / 7 + s2 * series
    series = 1.0 / 5 + s2 * series
    series = 1.0 / 3 + s2 * series
    exponential = tl.where(upper, 2.0 * s * (1.0 + s2 * series), -tl.log(u))
    return -tl.log(exponential)


@triton.jit
def sample_tiles_kernel(
    best_scores,  # f32 [n, num_tiles]
    best_ids,  # int32 [n, num_tiles]
    logits,  # f32 [n, vocab]
    seeds,
    positions,
    temperatures,
    stride_logits,
    STREAM: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    score = tl.load(
        logits + row.to(tl.int64) * stride_logits + token, mask=token < VOCAB, other=float("-inf")
    )
    if tl.load(temperatures + row) != 0.0:
        seed = tl.load(seeds + row)
        group = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
        zero = tl.zeros([TILE // 4], tl.uint32)
        position = zero + tl.load(positions + row).to(tl.uint32)
        word0, word1, word2, word3 = tl.philox_impl(
            position, group, zero + STREAM, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        )
        bits = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
        score = score + _bits_to_gumbel(bits)
    best = tl.max(score, 0)
    lowest = tl.min(tl.where(score == best, token, VOCAB - 1), 0)
    place = row * tl.num_programs(1) + tile
    tl.store(best_scores + place, best)
    tl.store(best_ids + place, lowest)


@triton.jit
def sample_reduce_kernel(
    out,
    best_scores,
    best_ids,
    NUM_TILES: tl.constexpr,
    TILES_PAD: tl.constexpr,
    VOCAB: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.arange(0, TILES_PAD)
    ok = tile < NUM_TILES
    score = tl.load(best_scores + row * NUM_TILES + tile, mask=ok, other=float("-inf"))
    token = tl.load(best_ids + row * NUM_TILES + tile, mask=ok, other=VOCAB - 1)
    lowest = tl.min(tl.where(score == tl.max(score, 0), token, VOCAB - 1), 0)
    tl.store(out + row, lowest.to(tl.int64))


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    stream: int = 0,
) -> torch.Tensor:
    """The contract of `quire_kernels.sampling.sample`; a row of NaN gives some id below vocab."""
    n, vocab = logits.shape
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n == 0:
        return out
    num_tiles = triton.cdiv(vocab, _TILE)
    best_scores = torch.empty((n, num_tiles), dtype=torch.float32, device=logits.device)
    best_ids = torch.empty((n, num_tiles), dtype=torch.int32, device=logits.device)
    sample_tiles_kernel[(n, num_tiles)](
        best_scores,
        best_ids,
        logits,
        seeds,
        positions,
        temperatures,
        logits.stride(0),
        STREAM=stream,
        VOCAB=vocab,
        TILE=_TILE,
        num_warps=8,
        **ROUNDING,
    )
    sample_reduce_kernel[(n,)](
        out,
        best_scores,
        best_ids,
        NUM_TILES=num_tiles,
        TILES_PAD=next_power_of_2(num_tiles),
        VOCAB=vocab,
        num_warps=1,
        **ROUNDING,
    )
    return out
