"""Eviction policies: one key function each; the evictable leaf with the smallest key goes first.

Knows neither the tree's shape nor blocks; adding a policy is adding a line to POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Aged(Protocol):
    """What a policy may look at. Fixed while a leaf is evictable, so a key never goes stale."""

    @property
    def last_access(self) -> float: ...  # clock reading of the last lock or unlock

    @property
    def created(self) -> float: ...  # clock reading of the insertion

    @property
    def hits(self) -> int: ...  # matches that used it


PolicyKey = tuple[float, float]


def lru(node: Aged) -> PolicyKey:
    """Least recently used first."""
    return (node.last_access, 0.0)


def lfu(node: Aged) -> PolicyKey:
    """Least often hit first; among equals the least recently used."""
    return (node.hits, node.last_access)


def fifo(node: Aged) -> PolicyKey:
    """Oldest first."""
    return (node.created, 0.0)


POLICIES: dict[str, Callable[[Aged], PolicyKey]] = {"lru": lru, "lfu": lfu, "fifo": fifo}


def policy(name: str) -> Callable[[Aged], PolicyKey]:
    """The key function called `name`; ValueError names the choices."""
    try:
        return POLICIES[name]
    except KeyError:
        choices = ", ".join(sorted(POLICIES))
        raise ValueError(f"eviction policy {name!r} is unknown: use one of {choices}") from None
