"""The plans that open a segment of the journal: all that runs is admitted where it stands.

Knows the state; not the journal, the link or the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from quire_scheduler.plan import Plan
from quire_scheduler.request import Request
from quire_scheduler.state import State

MAX_TOKENS = 1 << 20  # of the requests in one plan: 4 MiB on the wire


def opening(state: State, epoch: int) -> Iterator[Plan]:
    """The first plans of `epoch`, in flight as they come; none when nothing runs. Nothing is in
    flight before. They have no rows: requests keep slots and blocks, nobody is blamed, and nothing
    is computed twice."""
    for seq, part in enumerate(by_tokens(state.next_epoch(), MAX_TOKENS), 1):
        plan = Plan(epoch, seq, admitted=[(r, r.num_computed_tokens) for r in part])
        state.in_flight.append(plan)
        yield plan


def by_tokens(requests: Iterable[Request], most: int) -> Iterator[list[Request]]:
    """The requests in parts of at most so many tokens each, or of one request."""
    part: list[Request] = []
    total = 0
    for request in requests:
        if part and total + request.num_tokens > most:
            yield part
            part, total = [], 0
        part.append(request)
        total += request.num_tokens
    if part:
        yield part
