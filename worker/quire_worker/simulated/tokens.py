"""Tokens from a hash: what a simulated model "computes".

The state after a prefix is a sum over its tokens of a mix of token and position, so that a whole
prompt is one array operation and one more token one addition. The next token is a mix of that
state and the request's seed: a stream depends on nothing else, whatever the batch was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MASK = (1 << 64) - 1
SEED_MASK = 0x7FFFFFFF
_GOLDEN, _C1, _C2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64 of u64 [n]."""
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_C1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_C2)
    return z ^ (z >> np.uint64(31))


def term(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What each token adds to the state: u64 [n]; tokens and positions are i32 or i64 [n]."""
    at = positions.astype(np.uint64) << np.uint64(32)
    return mix(tokens.astype(np.uint64) | at)


def prefix_states(tokens: np.ndarray) -> np.ndarray:
    """The state after each token of a prefix from position 0: u64 [num_tokens]."""
    return np.cumsum(term(tokens, np.arange(len(tokens))), dtype=np.uint64)


def seed_keys(seeds: np.ndarray) -> np.ndarray:
    """What a request's seed does to its tokens: u64 [n]."""
    return mix(seeds.astype(np.uint64) & np.uint64(SEED_MASK))


def next_tokens(
    states: np.ndarray, keys: np.ndarray, vocab_size: int, eos_every: int, eos: int
) -> np.ndarray:
    """The token after each prefix, i32 [n]: EOS once in `eos_every` (0 = never)."""
    z = mix(states ^ keys)
    tokens = ((z >> np.uint64(20)) % np.uint64(vocab_size)).astype(np.int32)
    tokens[tokens == eos] = (eos + 1) % vocab_size
    if eos_every:
        tokens[(z >> np.uint64(8)) % np.uint64(eos_every) == 0] = eos
    return tokens


def oracle(
    prompt: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    max_model_len: int = 512,
    vocab_size: int = 997,
    eos_every: int = 0,
    eos: int = 2,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> tuple[list[int], str]:
    """What an undisturbed run yields: (output tokens, 'stop' or 'length'). In plain integers, a
    token at a time: the arrays above are checked against it."""
    state = 0
    for position, token in enumerate(prompt):
        state = (state + _mix(int(token) | position << 32)) & MASK
    key = _mix(seed & SEED_MASK)
    room = max_model_len - len(prompt)
    most = min(room, max_tokens if max_tokens is not None else room)
    out: list[int] = []
    while True:
        z = _mix(state ^ key)
        token = (z >> 20) % vocab_size
        if token == eos:
            token = (eos + 1) % vocab_size
        if eos_every and (z >> 8) % eos_every == 0:
            token = eos
        out.append(token)
        if (token == eos and not ignore_eos) or token in stop_token_ids:
            return out, "stop"
        if len(out) >= most:
            return out, "length"
        state = (state + _mix(token | (len(prompt) + len(out) - 1) << 32)) & MASK


def embedding(tokens: Sequence[int] | np.ndarray) -> list[float]:
    """What a request that pools gets."""
    return [float(len(tokens)), float(sum(map(int, tokens))), float(tokens[-1])]


def _mix(value: int) -> int:
    z = (value + _GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * _C1) & MASK
    z = ((z ^ (z >> 27)) * _C2) & MASK
    return z ^ (z >> 31)
