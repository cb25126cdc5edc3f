"""State: everything the engine knows about live requests, and the few ways it may change.

Knows no wire, no budget and no time: schedule.py decides who runs, results.py what came of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire_scheduler.columns import I32, Columns
from quire_scheduler.kv import KVManager
from quire_scheduler.probation import Probation
from quire_scheduler.request import Request
from quire_scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from quire_scheduler.plan import Plan


class State:
    """A live request is in `waiting`, on probation, or in a slot; a preempted one whose tokens
    are still in flight is in a slot and waiting at once. Touched by the engine thread only."""

    def __init__(self, columns: Columns, kv: KVManager, policy: str) -> None:
        self.columns = columns
        self.kv = kv
        self.waiting = WaitingQueue(policy)
        self.probation = Probation(policy)
        self.running: list[int] = []  # slots, in order of admission
        self.to_retire: list[int] = []  # slots the next plan gives up
        self.in_flight: list[Plan] = []  # sent, not acknowledged, oldest first
        self.leaving: set[int] = set()  # slots of preempted requests with tokens in flight
        self.num_preemptions = 0
        self._running_slots: I32 | None = None

    @property
    def running_slots(self) -> I32:
        """`running` as an array [num_running]."""
        if self._running_slots is None:
            self._running_slots = np.array(self.running, np.int32)
        return self._running_slots

    @property
    def queue(self) -> WaitingQueue:
        """Where the next newcomer is taken from."""
        return self.probation.queue if self.probation.active else self.waiting

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.probation.num_waiting

    def start(self, request: Request, slot: int) -> None:
        """The request, attached to the slot already, leaves the queue and runs."""
        self.queue.discard(request)
        self.running.append(slot)
        self._running_slots = None

    def preempt(self, request: Request) -> None:
        """Take its slot and blocks; it waits in front with what it has. Tokens of plans already
        sent are still appended, so it leaves the slot when the last of them is acknowledged."""
        self._stop(request)
        request.resumed = True
        request.num_preemptions += 1
        self.num_preemptions += 1
        if request.num_in_flight:
            self.leaving.add(request.slot)
        else:
            self.columns.detach(request, keep_tokens=True)
        self._wait(request)

    def finish(self, request: Request) -> None:
        """The one way out, for success, failure and cancel alike."""
        if request.finished:
            return
        request.finished = True
        self.waiting.discard(request)
        self.probation.discard(request)
        if request.slot >= 0:
            if request.slot in self.running:
                self._stop(request)
            self.leaving.discard(request.slot)
            self.columns.detach(request, keep_tokens=False)
        else:
            request.num_final_tokens = len(request.tokens)

    def acknowledge(self, plan: Plan) -> None:
        """The plan is done: what it retired is free, what it wrote is certain."""
        columns = self.columns
        self.in_flight.remove(plan)
        columns.num_in_flight[plan.slots] -= 1
        columns.num_pending[plan.sampled] -= 1
        columns.free.extend(plan.retired_slots.tolist())
        self.kv.acknowledge(plan.seq)

    def settle(self) -> None:
        """After a plan's tokens are appended: preempted requests of which nothing is in flight
        any more leave their old slots."""
        for slot in list(self.leaving):
            request = self.columns.requests[slot]
            if request is not None and not request.num_in_flight:
                self.leaving.remove(slot)
                self.columns.detach(request, keep_tokens=True)

    def computing(self, plan: Plan) -> list[Request]:
        """Requests that have a row in the plan."""
        requests = (self.columns.requests[slot] for slot in plan.slots.tolist())
        return [request for request in requests if request is not None]

    def restart(self) -> list[Request]:
        """The epoch is over: every request leaves its slot with its confirmed tokens, all slots
        are free, nothing is in flight, blocks of unanswered plans are forgotten. Returns the
        requests that were running; the caller queues them."""
        columns = self.columns
        out = []
        for slot in np.flatnonzero(columns.attached).tolist():
            request = columns.requests[slot]
            assert request is not None
            columns.detach(request, keep_tokens=True)
            request.resumed = True
            if slot in self.running:
                out.append(request)
        self.running.clear()
        self._running_slots = None
        self.to_retire.clear()
        self.in_flight.clear()
        self.leaving.clear()
        columns.num_in_flight[:] = 0
        columns.num_pending[:] = 0
        columns.free = list(range(columns.max_slots - 1, -1, -1))
        self.kv.reset_unacknowledged()
        return out

    def shorten(self, max_model_len: int) -> list[Request]:
        """The memory of new workers may hold less: requests, none of them in a slot, end at the
        new context's end. Returns those that have reached it."""
        over = []
        for request in [*self.waiting, *self.probation.waiting()]:
            request.max_total = min(request.max_total, max_model_len)
            if len(request.tokens) >= request.max_total:
                self.finish(request)
                over.append(request)
        return over

    def requeue(self, requests: list[Request]) -> None:
        for request in requests:
            self._wait(request)

    def check(self, live: list[Request]) -> None:
        """Raise AssertionError or BlockAccountingError where the books do not balance."""
        columns = self.columns
        attached = set(np.flatnonzero(columns.attached).tolist())
        flying = {slot for plan in self.in_flight for slot in plan.retired_slots.tolist()}
        free, retiring = set(columns.free), set(self.to_retire) | flying
        assert len(free) == len(columns.free), "a slot is free twice"
        assert not free & (attached | retiring), "a slot is free and in use"
        assert set(self.running) <= attached, "a running slot has no request"
        assert len(free) + len(set(self.running) | retiring) == columns.max_slots, "lost slots"
        for slot in attached:
            request = columns.requests[slot]
            assert request is not None and request.slot == slot and not request.finished
            kv = columns.kv[slot]
            assert kv is not None
            if slot in self.running:
                assert kv.live and kv.num_blocks == columns.num_blocks[slot]
                room = kv.num_blocks * self.kv.block_size
                assert columns.num_computed_tokens[slot] <= room, "computed beyond its blocks"
        if not self.in_flight:
            assert not columns.num_in_flight.any() and not columns.num_pending[list(attached)].any()
            running = self.running_slots
            assert (columns.wanted[running] >= 1).all(), "a running request wants nothing"
        for request in live:
            in_slot = request.slot >= 0
            queued = request in self.waiting or self.probation.holds(request)
            assert not request.finished and (in_slot or queued), "a request was forgotten"
        self.kv.check()
        if not attached and not self.kv.num_fenced:
            assert self.kv.num_used == 0, f"{self.kv.num_used} blocks held by nobody"

    def _stop(self, request: Request) -> None:
        slot = request.slot
        kv = self.columns.kv[slot]
        assert kv is not None
        self.kv.release(kv)
        self.running.remove(slot)
        self._running_slots = None
        self.to_retire.append(slot)

    def _wait(self, request: Request) -> None:
        if self.probation.is_member(request):
            self.probation.queue.push(request)
        else:
            self.waiting.push(request)
