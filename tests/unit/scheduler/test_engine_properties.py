"""Whatever arrives, fails or is cancelled: every stream equals the oracle, every block returns."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sched_helpers import Rig

from fakes.worker import FakeWorker, Options

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

requests = st.lists(
    st.tuples(
        st.integers(0, 30),  # turn at which it arrives
        st.integers(0, 3),  # family of prompts that share a prefix
        st.integers(1, 120),  # prompt tokens
        st.integers(1, 40),  # max_tokens
        st.booleans(),  # ignore_eos
        st.one_of(st.none(), st.integers(0, 25)),  # cancelled so many turns after arrival
        st.integers(0, 3),  # priority
    ),
    min_size=1,
    max_size=14,
)


def prompt_of(family: int, length: int) -> list[int]:
    return [(family * 131 + i * 7) % 900 + 3 for i in range(length)]


def drive(rig: Rig, arrivals, trouble=lambda turn: None, *, guilty_ok: bool = False) -> None:
    """Submit by the clock of turns; afterwards every stream that was not cancelled is right.

    guilty_ok: a request may have been alone in two failing steps; what it got is right so far.
    """
    cancels: dict[int, list[int]] = {}
    expected: dict[int, tuple[list[int], dict]] = {}
    cancelled: set[int] = set()
    queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    for turn in range(6000):
        while queue and queue[0][1][0] <= turn:
            handle, (_, family, length, max_tokens, ignore_eos, cancel, priority) = queue.pop(0)
            prompt = prompt_of(family, length)
            params = {"max_tokens": max_tokens, "ignore_eos": ignore_eos, "seed": family}
            rig.submit(prompt, handle=handle, priority=priority, **params)
            expected[handle] = (prompt, params)
            if cancel is not None:
                cancels.setdefault(turn + cancel, []).append(handle)
        for handle in cancels.pop(turn, ()):
            if rig.client[handle].reason is None:
                cancelled.add(handle)
                rig.engine.cancel(rig.client, handle)
        trouble(turn)
        rig.turn(random.Random(turn).choice((1, 1, 2, 1000)))
        done = {h for h, s in rig.client.streams.items() if s.reason is not None}
        if not queue and not cancels and done | cancelled == set(expected):
            break
    else:
        raise AssertionError(
            f"unfinished: {set(expected) - done - cancelled}, {rig.engine.stats()}"
        )
    rig.settle()
    for handle, (prompt, params) in expected.items():
        tokens, reason = rig.expected(prompt, **params)
        stream = rig.client[handle]
        guilty = guilty_ok and stream.reason == "error"
        if guilty:
            assert stream.error is not None and stream.error.name == "request_crashed_worker"
            assert stream.deaths >= 2
        if handle in cancelled or guilty:
            assert stream.tokens == tokens[: len(stream.tokens)]
        else:
            assert (stream.tokens, stream.reason) == (tokens, reason)
    stats = rig.engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0


@SETTINGS
@given(
    requests,
    st.integers(16, 512),
    st.integers(11, 60),
    st.integers(1, 9),
    st.sampled_from([0, 12]),
    st.sampled_from(["fcfs", "priority"]),
    st.booleans(),
    st.booleans(),
)
def test_streams_equal_the_oracle_under_any_load(
    arrivals, budget, num_blocks, max_num_seqs, eos_every, policy, caching, chunked
):
    options = Options(num_blocks=num_blocks, max_slots=max_num_seqs + 1, eos_every=eos_every)
    rig = Rig(
        options,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        scheduling_policy=policy,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
    )
    drive(rig, arrivals)


class Restless:
    """A journal that is full after every few records: a new segment each time."""

    def __init__(self, every: int) -> None:
        self.every, self.left, self.num_segments = every, every, 0

    @property
    def full(self) -> bool:
        return self.left <= 0

    def append(self, *record: object) -> None:
        self.left -= 1

    def rotate(self, hellos: list[object]) -> None:
        assert hellos
        self.left, self.num_segments = self.every, self.num_segments + 1

    def opened(self) -> None:
        self.left = self.every

    def flush_if_due(self, monotonic_ns: int, *, idle: bool) -> None:
        pass


@SETTINGS
@given(
    requests,
    st.integers(16, 128),
    st.integers(11, 60),
    st.integers(2, 9),
    st.sampled_from([0, 12]),
    st.booleans(),
    st.integers(3, 20),  # an opening, its answer, and a step: fewer would be all openings
    st.lists(st.integers(1, 60), max_size=2),
)
def test_segments_of_the_journal_change_no_stream(
    arrivals, budget, num_blocks, max_num_seqs, eos_every, caching, every, hellos
):
    """Epochs that begin where everything stands: no text changes, no block is lost."""
    options = Options(num_blocks=num_blocks, max_slots=max_num_seqs + 1, eos_every=eos_every)
    rig = Rig(
        options,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
    )
    journal = Restless(every)
    rig.engine._journal = rig.engine._driver._journal = journal  # type: ignore[assignment]
    drive(rig, arrivals, lambda turn: rig.worker.hello() if turn in hellos else None)
    assert journal.num_segments or rig.engine.counters.steps <= every
    assert all(stream.deaths == 0 for stream in rig.client.streams.values())


@SETTINGS
@given(
    requests, st.integers(16, 128), st.integers(11, 40), st.sets(st.integers(2, 120), max_size=4)
)
def test_failed_steps_lose_nothing(arrivals, budget, num_blocks, failing):
    """Steps fail at some points in time, whoever is in them."""
    rig = Rig(
        Options(num_blocks=num_blocks, max_slots=9), max_num_batched_tokens=budget, max_num_seqs=8
    )
    left = set(failing)

    def fail(plan, worker) -> str:
        if worker.num_steps in left and len(worker.slots) + len(plan.admit) > 1:
            left.discard(worker.num_steps)
            return "boom"
        return ""

    rig.options.fail = fail
    drive(rig, arrivals, guilty_ok=True)


@SETTINGS
@given(
    requests,
    st.integers(16, 128),
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from(["hello", "new", "lost"])), max_size=3),
)
def test_workers_that_come_and_go_lose_nothing(arrivals, budget, num_blocks, events):
    """'hello': the same process introduces itself again; 'new': another process takes its place;
    'lost': it is silent, then comes back with its memory."""
    options = Options(num_blocks=num_blocks, max_slots=5)
    rig = Rig(options, max_num_batched_tokens=budget, max_num_seqs=4)
    at = dict(events)

    def trouble(turn: int) -> None:
        kind = at.get(turn)
        if kind == "hello":
            rig.worker.hello()
        elif kind == "new":
            rig.worker.die()
            rig.worker = FakeWorker(rig.link.worker(), options)
            rig.worker.hello()
        elif kind == "lost":
            rig.worker.heartbeat()
            rig.engine.turn(0)
            rig.now += 0.9
            rig.engine.turn(0)
            for _ in range(4):
                rig.now += 0.9
                rig.engine.turn(0)
            rig.worker.hello()

    drive(rig, arrivals, trouble, guilty_ok=True)
