"""Traces: which request arrives when, with how many tokens, sharing which prefix.

JSON lines, one request each; `read` checks every field and says the line of a wrong one. Knows no
engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ConfigError

I32 = NDArray[np.int32]
MAX_REQUESTS = 10_000_000
MAX_LINE = 64 << 20
MAX_TOKENS = 1 << 24
MAX_ARRIVAL_S = 1e9
MAX_HASHES = 1 << 20
FIRST_TOKEN = 4  # made-up prompts leave the ids below alone: they are special ones, mostly
_MASK = np.uint64((1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. Its prompt is given as tokens, or its first blocks by the hashes of what they
    hold; what neither says is made up, and shared with nobody."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    request_id: str
    priority: int = 0
    block_hashes: tuple[bytes, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()

    def prompt(self, block_size: int, vocab_size: int) -> I32:
        """i32 [num_prompt_tokens]."""
        if self.prompt_token_ids:
            return np.array(self.prompt_token_ids, np.int32) % vocab_size
        hashes = self.block_hashes[: self.num_prompt_tokens // block_size]
        keys = [_key(name) for name in hashes]
        own = self.num_prompt_tokens - len(keys) * block_size
        parts = [_made_up(key, block_size, vocab_size) for key in keys]
        parts.append(_made_up(_key(self.request_id.encode()) ^ 1, own, vocab_size))
        return np.concatenate(parts)


def read(path: str) -> list[Arrival]:
    """The requests of a file, by arrival. Raises ConfigError with line and field."""
    try:
        with open(path, "rb") as file:
            found = list(parse(file, path))
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}.") from None
    if not found:
        raise ConfigError(f"--trace {path} holds no request.")
    return sorted(found, key=lambda a: a.arrival_s)


def parse(lines: Iterable[bytes], name: str) -> Iterator[Arrival]:
    """One Arrival for each line that is not empty; `name` is for messages."""
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if len(line) > MAX_LINE:
            raise ConfigError(f"{where}: a line of {len(line)} bytes; at most {MAX_LINE}.")
        count += 1
        if count > MAX_REQUESTS:
            raise ConfigError(f"{where}: more than {MAX_REQUESTS} requests.")
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not valid JSON: {error}.") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{where}: expected an object, one request a line.")
        yield arrival(tree, where, f"line-{number}")


def to_line(request: Arrival) -> str:
    """The JSON line that gives it back."""
    tree: dict[str, Any] = {
        "arrival_s": round(request.arrival_s, 6),
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
        "request_id": request.request_id,
    }
    if request.priority:
        tree["priority"] = request.priority
    if request.block_hashes:
        tree["block_hashes"] = [name.hex() for name in request.block_hashes]
    if request.prompt_token_ids:
        tree["prompt_token_ids"] = list(request.prompt_token_ids)
    return json.dumps(tree)


FIELDS = {
    "arrival_s", "num_prompt_tokens", "num_output_tokens", "request_id", "priority",
    "block_hashes", "prompt_token_ids",
}  # fmt: skip


def arrival(tree: dict[str, Any], where: str, default_id: str) -> Arrival:
    """The request that a line describes; ConfigError names `where`."""
    for key in tree:
        if key not in FIELDS:
            raise ConfigError(f"{where}: unknown field {key!r}; known: {', '.join(sorted(FIELDS))}")
    tokens = tree.get("prompt_token_ids") or ()
    if not isinstance(tokens, list | tuple) or len(tokens) > MAX_TOKENS:
        raise ConfigError(f"{where}: prompt_token_ids must be a list of token ids.")
    for token in tokens:
        if type(token) is not int or not 0 <= token < 1 << 24:
            raise ConfigError(f"{where}: prompt_token_ids holds {token!r}, which is no token id.")
    num_prompt = _integer(tree, "num_prompt_tokens", where, 1, MAX_TOKENS, len(tokens) or None)
    if tokens and len(tokens) != num_prompt:
        raise ConfigError(
            f"{where}: num_prompt_tokens is {num_prompt}, but prompt_token_ids has {len(tokens)}."
        )
    at = tree.get("arrival_s")
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise ConfigError(f"{where}: arrival_s must be a number of seconds, not {at!r}.")
    if not (math.isfinite(at) and 0 <= at <= MAX_ARRIVAL_S):
        raise ConfigError(f"{where}: arrival_s must be between 0 and {MAX_ARRIVAL_S:g}.")
    request_id = tree.get("request_id", default_id)
    if not isinstance(request_id, str) or not 0 < len(request_id) <= 512:
        raise ConfigError(f"{where}: request_id must be a text of 1 to 512 characters.")
    return Arrival(
        arrival_s=float(at),
        num_prompt_tokens=num_prompt,
        num_output_tokens=_integer(tree, "num_output_tokens", where, 1, MAX_TOKENS, None),
        request_id=request_id,
        priority=_integer(tree, "priority", where, -(1 << 31), (1 << 31) - 1, 0),
        block_hashes=_hashes(tree.get("block_hashes") or (), where),
        prompt_token_ids=tuple(tokens),
    )


def _integer(
    tree: dict[str, Any], key: str, where: str, low: int, high: int, default: int | None
) -> int:
    value = tree.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{where}: {key} must be an integer between {low} and {high}, not {value!r}."
        )
    return value


def _hashes(found: Any, where: str) -> tuple[bytes, ...]:
    if not isinstance(found, list | tuple) or len(found) > MAX_HASHES:
        raise ConfigError(f"{where}: block_hashes must be a list of hexadecimal texts.")
    try:
        return tuple(bytes.fromhex(text) for text in found)
    except (ValueError, TypeError):
        raise ConfigError(f"{where}: block_hashes must hold hexadecimal texts only.") from None


def _key(name: bytes) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _made_up(key: int, count: int, vocab_size: int) -> I32:
    """Tokens that a key stands for: i32 [count]."""
    z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = z ^ (z >> np.uint64(27))
    low = min(FIRST_TOKEN, vocab_size - 1)
    tokens: I32 = (z % np.uint64(vocab_size - low)).astype(np.int32) + np.int32(low)
    return tokens
