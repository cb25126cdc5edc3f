"""The waiting requests, in the order in which they may start.

Knows no blocks and no budget. A policy is one key function; requests that ran before go first
among equals.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from quire_scheduler.request import Request

Key = tuple[int, int, int]


def fcfs(request: Request) -> Key:
    """First come, first served; preempted first."""
    return (0, 0 if request.resumed else 1, request.arrival)


def priority(request: Request) -> Key:
    """Lowest priority number first; among equals preempted first, then by arrival."""
    return (request.priority, 0 if request.resumed else 1, request.arrival)


POLICIES: dict[str, Callable[[Request], Key]] = {"fcfs": fcfs, "priority": priority}


class WaitingQueue:
    """A heap by the policy's key; what is discarded leaves lazily."""

    def __init__(self, policy: str = "fcfs") -> None:
        self._key = POLICIES[policy]
        # The mutable state: an entry counts while its stamp is the request's in _live.
        self._heap: list[tuple[Key, int, Request]] = []
        self._live: dict[Request, int] = {}
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """All of them, in no order."""
        return iter(list(self._live))

    def __contains__(self, request: Request) -> bool:
        return request in self._live

    def push(self, request: Request) -> None:
        self._stamp += 1
        self._live[request] = self._stamp
        heapq.heappush(self._heap, (self._key(request), self._stamp, request))

    def discard(self, request: Request) -> None:
        """Take it out, if it is in."""
        if self._live.pop(request, None) is not None and len(self._heap) > 64 + 2 * len(self._live):
            self._heap = [e for e in self._heap if self._live.get(e[2]) == e[1]]
            heapq.heapify(self._heap)

    def first(self, count: int) -> list[Request]:
        """The next `count` in order; they stay."""
        entries: list[tuple[Key, int, Request]] = []
        while self._heap and len(entries) < count:
            entry = heapq.heappop(self._heap)
            if self._live.get(entry[2]) == entry[1]:
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self._heap, entry)
        return [entry[2] for entry in entries]
