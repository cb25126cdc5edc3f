"""Retry-After: what a refused client is told, checked by clients that do as they are told."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.turnover import MAX_WAIT_S, MEMORY, MIN_WAIT_S, Turnover


@dataclass
class Outcome:
    """What became of the clients that came back after a refusal."""

    returns: int = 0
    got_place: int = 0
    served: int = 0
    seconds: float = 0.0

    @property
    def share(self) -> float:
        return self.got_place / max(self.returns, 1)


def simulate(
    room: int,
    clients: int,
    service_s: float,
    spread: float,
    *,
    arrive_over_s: float = 0.0,
    seed: int = 0,
    header: bool = False,
    cold: bool = False,
) -> Outcome:
    """`clients` come once, within arrive_over_s; a refused one returns when it was told to, to the
    millisecond or (header) to the whole second above. `cold`: nothing was served before."""
    rng = random.Random(seed)
    turnover, out = Turnover(), Outcome()
    live = 0
    if not cold:
        turnover.busy(-2 * service_s)
        for _ in range(2 * room):
            turnover.freed(0.0)
        turnover.rest(0.0)
    events: list[tuple[float, int, str]] = []
    for i in range(clients):
        heapq.heappush(events, (rng.random() * arrive_over_s, i, "first"))
    while events:
        now, who, kind = heapq.heappop(events)
        out.seconds = now
        if kind == "end":
            live -= 1
            out.served += 1
            turnover.freed(now)
            if live < room:
                turnover.rest(now)
            continue
        out.returns += kind == "again"
        if live < room:
            live += 1
            out.got_place += kind == "again"
            if live == room:
                turnover.busy(now)
            length = service_s * (1 + spread * (2 * rng.random() - 1))
            heapq.heappush(events, (now + length, who, "end"))
            continue
        wait = turnover.retry_after(now)
        assert MIN_WAIT_S <= wait <= MAX_WAIT_S
        wait = -(-wait // 1) if header else -(-wait // 0.001) * 0.001
        heapq.heappush(events, (now + wait, who, "again"))
    return out


@given(
    room=st.integers(1, 64),
    load=st.integers(2, 10),
    service_s=st.floats(0.2, 4.0),
    spread=st.floats(0.1, 0.9),
    seed=st.integers(0, 1000),
    header=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_who_comes_back_as_told_usually_gets_a_place(room, load, service_s, spread, seed, header):
    """A burst of up to ten times what there is room for, within the time of one service."""
    if header:  # whole seconds send back together those who were told of one second
        service_s = max(service_s, 1.0)
    out = simulate(
        room, load * room, service_s, spread, arrive_over_s=service_s, seed=seed, header=header
    )
    assert out.served == load * room
    if out.returns >= 20:
        assert out.share > 0.5
    # and the server is not left idle by telling them to stay away for long
    assert out.seconds < 2 * load * service_s + 5.0


@pytest.mark.parametrize("service_s", [0.05, 1.0, 20.0])
def test_a_server_that_has_measured_nothing_yet_serves_all_in_the_end(service_s: float):
    out = simulate(16, 160, service_s, 0.5, arrive_over_s=0.1, cold=True)
    assert out.served == 160


def test_places_that_end_in_waves_are_measured_over_whole_waves():
    turnover, now = Turnover(), 0.0
    turnover.busy(now)
    for _ in range(3):
        now += 10.0
        for _ in range(100):
            turnover.freed(now)
    assert turnover.interval(now) == pytest.approx(0.1, rel=0.05)
    assert turnover.retry_after(now) == pytest.approx(0.1, rel=0.05)  # and not the gap in a wave


def test_each_refusal_is_told_its_own_moment_and_promises_lapse():
    turnover, now = Turnover(), 99.0
    turnover.busy(0.0)
    for _ in range(99):
        turnover.freed(now)  # one place a second
    assert [round(turnover.retry_after(now)) for _ in range(4)] == [1, 2, 3, 4]
    turnover.rest(now)
    assert round(turnover.retry_after(now + 2.0)) == 3
    assert round(turnover.retry_after(now + 500.0)) == 1


def test_what_another_told_comes_first():
    turnover = Turnover()
    turnover.told(5.0, 7.5)
    assert turnover.retry_after(5.0) == pytest.approx(7.5 + turnover.first_guess_s)


def test_nobody_is_told_more_than_a_minute_and_it_does_not_build_up():
    turnover = Turnover()
    turnover.busy(0.0)
    waits = [turnover.retry_after(1.0) for _ in range(10_000)]
    assert max(waits) == MAX_WAIT_S
    assert turnover.retry_after(31.0) <= MAX_WAIT_S
    for _ in range(3000):
        turnover.freed(31.0)  # a hundred a second it turns out
    assert turnover.retry_after(31.0) < 10


def test_a_change_of_pace_is_learnt():
    turnover = Turnover()
    turnover.busy(0.0)
    for _ in range(1000):
        turnover.freed(10.0)
    assert turnover.interval(10.0) < 0.05
    turnover.rest(10.0)
    turnover.busy(10.0)
    now = 10.0
    for _ in range(3 * MEMORY):
        now += 1.0
        turnover.freed(now)
    assert turnover.interval(now) == pytest.approx(1.0, rel=0.25)
