"""From float32 logits to tokens, and to log-probabilities where they are asked for.

Knows slots' sampling columns and nothing of plans or requests. A row's outcome has the same
bits whatever else is in the batch: each feature touches only the rows that use it, and a
token's randomness is keyed by the seed and the token's position in its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from quire.errors import QuireError
from quire.sampling import MAX_LOGPROBS
from quire_kernels import dispatch
from quire_kernels.logits import Penalties
from quire_kernels.sampling import gumbel_noise
from quire_worker import slots as feature
from quire_worker.slots import SlotTable

STREAM = 0  # Philox stream of sampled tokens
# On a CPU, up to this size one thread does it all: waking a team for ops of some microseconds
# costs more than it saves, and milliseconds where another process holds the second core.
SERIAL_ELEMENTS = 1 << 18
# Up to this vocabulary a CPU draws noise for every token: looking first for those that can win
# (see quire_kernels.sampling.sample; the token is the same) costs more than it saves.
DENSE_VOCAB = 4096


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of m rows; K = min(MAX_LOGPROBS, vocab), of which a row wants the first `num_top`."""

    rows: np.ndarray  # i64 [m], rows of the batch, rising
    sampled: np.ndarray  # f32 [m]
    ranks: np.ndarray  # u32 [m], 1 = most likely
    top_ids: np.ndarray  # i32 [m, K], falling, ties to the lowest id
    top: np.ndarray  # f32 [m, K]
    num_top: np.ndarray  # i32 [m]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What n rows drew."""

    tokens: np.ndarray  # i32 [n]; meaningless where `errors` has the row
    logprobs: Logprobs | None = None
    errors: dict[int, QuireError] = field(default_factory=dict)  # row -> why it alone failed


def sample(
    logits: torch.Tensor, table: SlotTable, slots: np.ndarray, wants_logprobs: np.ndarray
) -> Sampled:
    """logits f32 [n, vocab], which this may overwrite; slots i32 [n]; wants_logprobs bool [n].

    The token drawn for a slot is the one at index `table.num_tokens[slot]` of its sequence.
    """
    if logits.device.type != "cpu" or logits.numel() > SERIAL_ELEMENTS:
        return _sample(logits, table, slots, wants_logprobs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _sample(logits, table, slots, wants_logprobs)
    finally:
        torch.set_num_threads(threads)


def _sample(
    logits: torch.Tensor, table: SlotTable, slots: np.ndarray, wants_logprobs: np.ndarray
) -> Sampled:
    features = table.features[slots]
    raw = _log_softmax(logits, wants_logprobs)  # before the logits are edited
    if not features.any():
        best, tokens = logits.max(dim=-1)
    else:
        if (features & feature.EDITS).any():
            _edit(logits, table, slots, features)
        best, tokens = _draw(logits, table, slots, features)
    fine = best.isfinite()
    host_tokens = tokens.cpu().numpy().astype(np.int32)  # torch's own cast takes 100 us here
    errors: dict[int, QuireError] = {}
    if not bool(fine.all()):
        for row in (~fine).nonzero()[:, 0].tolist():
            errors[row] = _numeric_error(float(best[row]))
    logprobs = None
    if raw is not None:
        logprobs = _logprobs(raw, tokens, np.flatnonzero(wants_logprobs), table, slots)
    return Sampled(host_tokens, logprobs, errors)


def _draw(
    logits: torch.Tensor, table: SlotTable, slots: np.ndarray, features: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """(processed logit f32 [n], token i64 [n]); NaN or infinite where the row is broken."""
    rows = np.flatnonzero(features & feature.RANDOM)
    if len(rows) == len(slots):
        return _draw_rows(logits, table, slots, features)
    best, tokens = logits.max(dim=-1)
    if len(rows):
        at = torch.from_numpy(rows).to(logits.device)
        best[at], tokens[at] = _draw_rows(logits[at], table, slots[rows], features[rows])
    return best, tokens


def _draw_rows(
    logits: torch.Tensor, table: SlotTable, slots: np.ndarray, features: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _draw, for rows that all are random."""

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values[slots]).to(logits.device)

    temperatures = column(table.temperature)
    truncate = bool((features & feature.TRUNCATE).any())
    if truncate or (table.temperature[slots] != 1).any():
        logits = dispatch.process_logits(
            logits,
            temperatures,
            top_k=column(table.top_k) if truncate and table.top_k[slots].any() else None,
            top_p=column(table.top_p) if truncate and (table.top_p[slots] < 1).any() else None,
            min_p=column(table.min_p) if truncate and table.min_p[slots].any() else None,
        )
    seeds, positions = column(table.seed), column(table.num_tokens)
    if logits.device.type == "cpu" and logits.shape[1] <= DENSE_VOCAB:
        noise = gumbel_noise(seeds, positions, logits.shape[1], stream=STREAM)
        tokens = noise.add_(logits).argmax(dim=-1)
    else:
        tokens = dispatch.sample(logits, seeds, positions, temperatures, stream=STREAM)
    return logits.gather(1, tokens[:, None])[:, 0], tokens


# -- edits, in vLLM's order: allowed ids, min_tokens, bias, penalties ------------------------
def _edit(logits: torch.Tensor, table: SlotTable, slots: np.ndarray, features: np.ndarray) -> None:
    """Change the rows that ask for it, in place."""
    for row in np.flatnonzero(features & feature.ALLOWED).tolist():
        allowed = torch.from_numpy(table.allowed[int(slots[row])]).to(logits.device)
        kept = logits[row, allowed]
        logits[row] = float("-inf")
        logits[row, allowed] = kept
    for row in np.flatnonzero(features & feature.MIN_TOKENS).tolist():
        slot = int(slots[row])
        if table.num_tokens[slot] - table.prompt_len[slot] >= table.min_tokens[slot]:
            table.features[slot] &= ~np.uint8(feature.MIN_TOKENS)  # reached: never asked again
            continue
        stops = table.stop_ids[slot, : table.num_stop_ids[slot]]
        if not table.ignore_eos[slot]:
            stops = np.concatenate((stops, table.eos_token_ids))
        logits[row, torch.from_numpy(stops.astype(np.int64)).to(logits.device)] = float("-inf")
    for row in np.flatnonzero(features & feature.BIAS).tolist():
        ids, bias = table.logit_bias[int(slots[row])]
        at = torch.from_numpy(ids).to(logits.device)
        logits[row, at] += torch.from_numpy(bias).to(logits.device)
    rows = np.flatnonzero(features & feature.PENALTY)
    if len(rows):
        at = torch.from_numpy(rows).to(logits.device)
        logits[at] = _penalised(logits[at], table, slots[rows])


def _penalised(logits: torch.Tensor, table: SlotTable, slots: np.ndarray) -> torch.Tensor:
    seen = [table.seen[slot] for slot in slots.tolist()]
    values = torch.from_numpy(table.penalties[slots]).to(logits.device)
    penalties = Penalties(
        output_counts=torch.stack([counts for counts, _ in seen]),
        prompt_mask=torch.stack([mask for _, mask in seen]),
        repetition=values[:, 0],
        presence=values[:, 1],
        frequency=values[:, 2],
    )
    return dispatch.process_logits(logits, torch.ones_like(values[:, 0]), penalties=penalties)


# -- log-probabilities -----------------------------------------------------------------------
def _log_softmax(logits: torch.Tensor, wanted: np.ndarray) -> torch.Tensor | None:
    """f32 [m, vocab] of the rows that want them, of the logits as the model gave them."""
    if not wanted.any():
        return None
    if wanted.all():
        return logits.log_softmax(dim=-1)
    rows = torch.from_numpy(np.flatnonzero(wanted)).to(logits.device)
    return logits[rows].log_softmax(dim=-1)


def _logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, rows: np.ndarray, table: SlotTable, slots: np.ndarray
) -> Logprobs:
    own = tokens[torch.from_numpy(rows).to(tokens.device)][:, None]
    sampled = raw.gather(1, own)
    ranks = (raw > sampled).sum(dim=-1) + 1
    # Always the same K, so that ties at the end of a row's list don't depend on its neighbours' k.
    top, top_ids = raw.topk(min(MAX_LOGPROBS, raw.shape[1]), dim=-1)
    values, ids = top.cpu().numpy(), top_ids.cpu().numpy().astype(np.int32)
    order = np.lexsort((ids, -values), axis=-1)
    return Logprobs(
        rows=rows,
        sampled=sampled[:, 0].cpu().numpy(),
        ranks=ranks.cpu().numpy().astype(np.uint32),
        top_ids=np.take_along_axis(ids, order, axis=-1),
        top=np.take_along_axis(values, order, axis=-1),
        num_top=np.minimum(table.num_logprobs[slots[rows]], values.shape[1]),
    )


def _numeric_error(value: float) -> QuireError:
    if value == float("-inf"):
        return QuireError(
            "invalid_request",
            "no token is left to sample: allowed_token_ids, logit_bias and min_tokens together "
            "forbid every token.",
        )
    return QuireError(
        "numeric_error", f"the model gave {value} as a logit; the request can't go on."
    )
