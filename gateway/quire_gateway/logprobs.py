"""Log-probabilities of sampled tokens, from the engine's columns.

Knows no JSON layout; openai/shapes.py has the two that clients expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.v1 import common_pb2
from quire.wire import unpack_f32, unpack_i32, unpack_u32


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One sampled token. token_ids[0] is the token itself, the others the most likely ones in
    falling order; logprobs stand beside them."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


def read_logprobs(
    columns: common_pb2.LogprobColumns, num_tokens: int
) -> list[TokenLogprobs | None]:
    """[num_tokens], None for tokens of rows that did not ask. Raises ValueError when the
    columns do not fit the tokens."""
    counts = unpack_u32(columns.counts)
    token_ids, logprobs = unpack_i32(columns.token_ids), unpack_f32(columns.logprobs)
    if len(counts) != num_tokens or not sum(counts) == len(token_ids) == len(logprobs):
        raise ValueError("the scheduler sent log-probabilities that do not fit the tokens")
    entries: list[TokenLogprobs | None] = []
    place = 0
    for count in counts:
        end = place + count
        entries.append(TokenLogprobs(token_ids[place:end], logprobs[place:end]) if count else None)
        place = end
    return entries
