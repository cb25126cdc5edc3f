"""The boring parts of the KV tests: a small manager, prompts, an admitted request."""

from __future__ import annotations

from typing import Any

import numpy as np

from quire_scheduler.kv import KVHandle, KVManager, ModelIdentity, Namespace
from quire_scheduler.kv.names import root_of

BLOCK = 4
IDENTITY = ModelIdentity(b"m" * 16, "float32", "float32")
NS = Namespace()
ROOT = root_of(IDENTITY, NS, BLOCK)


class Clock:
    """Every reading is later than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_kv(num_blocks: int = 17, **options: Any) -> KVManager:
    return KVManager(num_blocks, BLOCK, IDENTITY, clock=Clock(), **options)


def block_ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def prompt(num_tokens: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + num_tokens, dtype=np.int32)


def admit(kv: KVManager, tokens: np.ndarray, *, owner: str = "", seq: int = 1) -> KVHandle:
    """Matches, allocates all and publishes all full blocks under plan `seq`."""
    _, handle = kv.match_prefix(tokens, NS, owner=owner)
    grown = kv.allocate_for(handle, -(-len(tokens) // BLOCK) - handle.num_blocks)
    assert grown is not None
    kv.publish(handle, tokens, seq)
    return handle


def take_named(kv: KVManager, seq: int) -> tuple[np.ndarray, bytes]:
    """What plan `seq` tells, with the deferred work done before."""
    kv.prepare_names()
    return kv.take_named(seq)
