"""From raw logits to the processed logits that `sampling.sample` draws from, in plain torch.

Knows no requests: one row of tensors per row of the batch. A row's result depends on that row
alone, and a row whose switches are off keeps its bits. Two traps shape the code. A torch sum over a
long row is split over threads when there are few rows, so its bits depend on the batch; softmax and
cumsum work row by row, and only they are used. And every filter is one threshold per row, so equal
logits stay or go together and no order of ties can leak in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Candidates looked at before a whole row is sorted; constant, so no row depends on another's k.
_SHORT_LIST = 512


@dataclass(frozen=True)
class Penalties:
    """The arguments of `apply_penalties`; off is repetition 1, presence 0, frequency 0."""

    output_counts: torch.Tensor  # [n, vocab] int32: how often each token was generated
    prompt_mask: torch.Tensor  # [n, vocab] bool: the token occurs in the prompt
    repetition: torch.Tensor  # [n] f32
    presence: torch.Tensor  # [n] f32
    frequency: torch.Tensor  # [n] f32


def process_logits(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    penalties: Penalties | None = None,
) -> torch.Tensor:
    """Penalties, temperature, top-k, top-p, min-p, in that order (transformers' order).

    logits [n, vocab] any float dtype; temperatures f32 [n], 0 = greedy; top_k int [n], 0 = off;
    top_p f32 [n], 1 = off; min_p f32 [n], 0 = off. None = off for every row. Returns f32 [n,
    vocab]; `logits` is not changed, but may be returned itself when it is f32 and nothing applies.
    """
    logits = logits.float()
    if penalties is not None:
        logits = apply_penalties(
            logits,
            penalties.output_counts,
            penalties.prompt_mask,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
        )
    logits = apply_temperature(logits, temperatures)
    return mask_top_k_top_p_min_p(logits, top_k, top_p, min_p)


def apply_penalties(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    prompt_mask: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """logits [n, vocab], other shapes as in `Penalties` -> f32 [n, vocab].

    Repetition (CTRL, arXiv 1909.05858): over prompt and output, positive logits are divided by it
    and others multiplied. Presence and frequency (the OpenAI definition): over the output, logit -
    frequency * count - presence * (count > 0).
    """
    logits = logits.float()
    factor = repetition[:, None]
    seen = (prompt_mask | (output_counts > 0)) & (factor != 1)
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - frequency[:, None] * output_counts - presence[:, None] * (output_counts > 0)


def apply_temperature(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """logits f32 [n, vocab] / temperatures f32 [n]; rows at 0 (greedy) and 1 keep their bits."""
    divisor = torch.where(temperatures == 0, torch.ones_like(temperatures), temperatures)
    return logits / divisor[:, None]  # x / 1 is exact


def mask_top_k_top_p_min_p(
    logits: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits f32 [n, vocab] -> f32 [n, vocab] with -inf at what is excluded; shapes as in
    `process_logits`.

    top-k keeps the k highest logits and any equal to the k-th; top-p (arXiv 1904.09751) keeps,
    among those and with their probabilities renormalised, the highest until their sum reaches p,
    and any equal to the last; min-p (arXiv 2407.01082) keeps probabilities of at least min_p times
    the highest. The most likely token always stays.
    """
    n, vocab = logits.shape
    if top_k is None and top_p is None and min_p is None:
        return logits
    threshold = torch.full((n,), float("-inf"), device=logits.device)
    if top_k is not None or top_p is not None:
        k = torch.full((n,), vocab, device=logits.device) if top_k is None else top_k.long()
        k = torch.where((k <= 0) | (k > vocab), vocab, k)
        p = torch.ones(n, device=logits.device) if top_p is None else top_p
        threshold = _threshold(logits, k, p) if logits.is_cuda else _threshold_short(logits, k, p)
    if min_p is not None:
        highest = logits.amax(dim=-1)
        threshold = torch.maximum(
            threshold, highest + min_p.clamp(0, 1).log()
        )  # log 0 = -inf = off
    return logits.masked_fill(logits < threshold[:, None], float("-inf"))


def _threshold(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The lowest logit that top-k and top-p keep, [n]; sorts whole rows, waits for no device."""
    values = logits.sort(dim=-1, descending=True).values
    kth = values.gather(1, k[:, None] - 1)
    probs = values.masked_fill(values < kth, float("-inf")).softmax(dim=-1)
    lowest = torch.maximum(kth, _nucleus(values, probs, p)[:, None])
    return torch.where((k < logits.shape[1]) | (p < 1), lowest[:, 0], float("-inf"))


def _nucleus(values: torch.Tensor, probs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The last value that top-p keeps, [n]; values and their probs [n, length] come sorted, highest
    first.
    """
    before = torch.nn.functional.pad(probs.cumsum(dim=-1)[:, :-1], (1, 0))
    kept = ((before < p[:, None]) & (probs > 0)).sum(dim=-1).clamp(min=1)
    last = values.gather(1, kept[:, None] - 1)[:, 0]
    return torch.where(p < 1, last, float("-inf"))


def _threshold_short(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """`_threshold` for CPU: a short list of the highest logits settles nearly every row; the rest
    are sorted whole.

    Which way a row takes follows from its own numbers only, never from its neighbours'.
    """
    n, vocab = logits.shape
    threshold = torch.full((n,), float("-inf"), device=logits.device)
    length = min(_SHORT_LIST, vocab)
    rows = ((k < vocab) | (p < 1)).nonzero()[:, 0]
    if len(rows) == 0:
        return threshold
    picked, k, p = logits[rows], k[rows], p[rows]
    values, ids = picked.topk(length, dim=-1)
    kth = values.gather(1, k.clamp(max=length)[:, None] - 1)
    # Settled by top-k: the k-th value and all its equals are in the list.
    by_k = (k <= length) & ((kth[:, 0] > values[:, -1]) | (length == vocab))
    probs = torch.zeros_like(values)
    probs[by_k] = values[by_k].masked_fill(values[by_k] < kth[by_k], float("-inf")).softmax(dim=-1)
    # Settled by top-p alone: the list holds the nucleus.
    by_p = (k == vocab) & (p < 1) & ~by_k
    probs[by_p] = picked[by_p].softmax(dim=-1).gather(1, ids[by_p])
    by_p &= probs.cumsum(dim=-1)[:, -1] > p
    found = _nucleus(values, probs, p)
    found = torch.where(by_k, torch.maximum(kth[:, 0], found), found)
    rest = ~(by_k | by_p)
    if rest.any():
        found[rest] = _threshold(picked[rest], k[rest], p[rest])
    threshold[rows] = found
    return threshold
