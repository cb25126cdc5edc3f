"""Sampling with randomness keyed by position: Philox, Gumbel noise, argmax; in plain torch.

Knows no requests and no grammar: rows of processed logits in, token ids out.

A drawn token is argmax over v of (processed logit + Gumbel noise), ties to the lowest id (the
Gumbel-max trick, Gumbel 1954; Maddison et al., arXiv 1411.0030). The noise of token v at position t
is word v % 4 of Philox4x32-10 (Salmon et al., SC 2011, Random123) with key = the 64-bit seed and
counter = (t, v // 4, stream, 0): no state, so a restart, another batch or a speculative check draws
the same token.

Bits to noise, exactly: k = bits >> 8 (24 bits); u = (k + 1/2) * 2^-24 as a real number, so 0 < u <
1; noise = -log(-log(u)) rounded to f32. In f32 arithmetic k + 1/2 rounds to k + 1 or k from 2^23 on
and u would reach 1, whose noise is infinite: one wrong token per 2^25 draws. Hence float64 here,
and a log1p form in `gpu/sampling.py`.
"""

from __future__ import annotations

import numpy as np
import torch

MAX_NOISE = 17.4  # above the largest noise, -log(-log(1 - 2^-25)) = 17.3287

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32_numpy(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counter uint32 [..., 4], key uint32 [..., 2] -> uint32 [..., 4]. The oracle of
    the others.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    mask = np.uint64(_MASK)
    for _ in range(10):
        product0, product1 = np.uint64(_M0) * c0, np.uint64(_M1) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & mask,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + np.uint64(_W0)) & mask, (k1 + np.uint64(_W1)) & mask
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same over four counter and two key tensors, int64 holding 32 bits, shapes that broadcast
    -> four like them.

    int64 products wrap: their low 64 bits are right, and masking after the shift drops the copied
    sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def bits_to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """int64 holding 32 bits -> f32 Gumbel noise, by the mapping at the head of this file."""
    u = ((bits >> 8).double() + 0.5).mul_(2.0**-24)
    return u.log_().neg_().log_().neg_().float()


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int, *, stream: int = 0
) -> torch.Tensor:
    """seeds int64 [n] (the seed's 64 bits), positions int [n] -> f32 [n, vocab_size]."""
    groups = torch.arange((vocab_size + 3) // 4, device=seeds.device)[None, :]
    words = _philox(seeds[:, None], positions[:, None], groups, stream)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    return bits_to_gumbel(bits)


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    stream: int = 0,
) -> torch.Tensor:
    """logits f32 [n, vocab] processed (see `logits.py`), seeds int64 [n], positions int [n],
    temperatures f32 [n] -> int64 [n].

    `positions` is the index in the sequence of the token being drawn. Temperature 0 draws no noise;
    other values are not applied again. Ties go to the lowest id. A row of NaN gives the id of its
    first NaN.

    Noise never exceeds MAX_NOISE, so a token whose logit lies further than that below a score
    already reached cannot win. Only the others get noise, or all when they are many: the same
    answer at a fraction of the work.
    """
    best_logit, best = logits.max(dim=-1)
    rows = (temperatures != 0).nonzero()[:, 0]
    if len(rows) == 0:
        return best
    reached = best_logit + gumbel_noise_at(seeds, positions, best, stream=stream)
    slack = MAX_NOISE + reached.abs() * 1e-6  # the second term covers rounding when logits are huge
    threshold = torch.where(temperatures != 0, reached - slack, float("inf"))
    possible = logits >= threshold[:, None]
    crowded = possible.count_nonzero(dim=-1) > logits.shape[1] // 16
    dense, sparse = crowded.nonzero()[:, 0], (~crowded).nonzero()[:, 0]
    drawn = best.clone()
    if len(dense) > 0:
        noise = gumbel_noise(seeds[dense], positions[dense], logits.shape[1], stream=stream)
        drawn[dense] = (logits[dense] + noise).argmax(dim=-1)
    if len(sparse) > 0:
        row, token = possible[sparse].nonzero(as_tuple=True)
        row = sparse[row]
        noise = gumbel_noise_at(seeds[row], positions[row], token, stream=stream)
        score = logits[row, token] + noise
        drawn = _highest_score(drawn, row, token, score, logits.shape[1])
    return drawn


def _highest_score(
    drawn: torch.Tensor, row: torch.Tensor, token: torch.Tensor, score: torch.Tensor, vocab: int
) -> torch.Tensor:
    """drawn int64 [n] with, at each row that has candidates (row, token, score: [m]), its best
    token, ties to the lowest.
    """
    highest = score.new_full(drawn.shape, float("-inf")).scatter_reduce_(0, row, score, "amax")
    winner = score == highest[row]
    lowest = torch.full_like(drawn, vocab).scatter_reduce_(0, row[winner], token[winner], "amin")
    return torch.where(lowest < vocab, lowest, drawn)


def gumbel_noise_at(
    seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, *, stream: int = 0
) -> torch.Tensor:
    """f32 noise of single tokens, elementwise: seeds int64, positions and token ids int, of shapes
    that broadcast.
    """
    tokens = tokens.long()
    words = _philox(seeds, positions, tokens >> 2, stream)
    lane = tokens & 3
    low, high = (
        torch.where(lane == 0, words[0], words[1]),
        torch.where(lane == 2, words[2], words[3]),
    )
    return bits_to_gumbel(torch.where(lane < 2, low, high))


def _philox(
    seeds: torch.Tensor, positions: torch.Tensor, groups: torch.Tensor, stream: int
) -> list[torch.Tensor]:
    """The four words of counter (position, group, stream, 0) under key = seed."""
    seeds, positions = seeds.long(), positions.long()
    zero = torch.zeros_like(positions)
    return philox4x32(
        [positions, groups, zero + stream, zero], [seeds & _MASK, (seeds >> 32) & _MASK]
    )
