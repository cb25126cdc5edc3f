"""Probation: finding the request that kills workers, by letting suspects return in halves.

Knows no worker and no slot. A suspect was computing in a step that failed; a group of suspects
runs apart from everyone else until each of them has yielded a token again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from quire_scheduler.request import Request
from quire_scheduler.waiting import WaitingQueue

MAX_DEATHS = 2  # of a request that was alone in the last failing step
PROOF_TOKENS = 16  # that a request gets further by, and its deaths so far were not its doing


class Probation:
    """At most one group runs; the others wait in `_groups`."""

    def __init__(self, policy: str) -> None:
        self.queue = WaitingQueue(policy)  # of the current group, those not running
        self._marks: dict[Request, int] = {}  # current group -> tokens it must exceed
        self._groups: deque[list[Request]] = deque()

    @property
    def active(self) -> bool:
        return bool(self._marks)

    @property
    def suspects(self) -> bool:
        """Whether there are any, running or waiting."""
        return bool(self._marks or self._groups)

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + sum(map(len, self._groups))

    def is_member(self, request: Request) -> bool:
        """Whether it is of the group that runs now."""
        return request in self._marks

    def holds(self, request: Request) -> bool:
        """Whether it waits here."""
        return request in self.queue or any(request in group for group in self._groups)

    def waiting(self) -> list[Request]:
        """All that wait here."""
        return [*self.queue, *(request for group in self._groups for request in group)]

    def add(self, suspects: Sequence[Request]) -> None:
        """Suspects from elsewhere: a group of their own, behind those that wait."""
        if suspects:
            self._groups.append(list(suspects))

    def blame(self, computing: Sequence[Request]) -> Request | None:
        """A step failed in which these requests were computing: each has one death more. Those
        of the current group that were not in the step form a group again. Returns the culprit,
        when there was but one and it has died before.

        A request that kills does it again at the same place, since its tokens are the same. One
        that got further in between was only there: its deaths count anew. So a long request
        outlives any number of workers that died of something else."""
        blamed = set(computing)
        rest = [r for r in self._marks if r not in blamed and not r.finished]
        self._marks.clear()
        for request in list(self.queue):
            self.queue.discard(request)
        if rest:
            self._groups.appendleft(rest)
        for request in computing:
            if request.num_tokens >= request.blamed_at + PROOF_TOKENS:
                request.deaths = 0
            request.deaths += 1
            request.blamed_at = request.num_tokens
        if len(computing) == 1 and computing[0].deaths >= MAX_DEATHS:
            return computing[0]
        half = (len(computing) + 1) // 2
        for group in (list(computing[half:]), list(computing[:half])):
            if group:
                self._groups.appendleft(group)
        return None

    def discard(self, request: Request) -> None:
        """It is finished."""
        self._marks.pop(request, None)
        self.queue.discard(request)
        for group in self._groups:
            if request in group:
                group.remove(request)

    def advance(self) -> list[Request]:
        """Let go of a group that has proved itself and start the next one. Returns requests to be
        queued with everyone else."""
        released: list[Request] = []
        if self._marks and all(r.num_tokens > mark for r, mark in self._marks.items()):
            self._marks.clear()
            for request in list(self.queue):
                self.queue.discard(request)
                released.append(request)
        while not self._marks and self._groups:
            group = self._groups.popleft()
            self._marks = {r: r.num_tokens for r in group}
            for request in group:
                self.queue.push(request)
        return released
