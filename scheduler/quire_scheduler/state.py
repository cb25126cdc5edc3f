"""State: everything the engine knows about live requests, and the few ways it may change.

Knows no wire, no budget and no time: schedule.py decides who runs, results.py what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from quire.step_cost import StepCostModel
from quire_scheduler.columns import Columns, Slots
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
        self.to_retire: list[int] = []  # slots the next plan gives up
        self.in_flight: list[Plan] = []  # sent, not acknowledged, oldest first
        self.leaving: set[int] = set()  # slots of preempted requests with tokens in flight
        self.cost = StepCostModel()  # of the workers; knows nothing before they come
        self.preemptions = {"recompute": 0, "offload": 0}
        self.num_recomputed_tokens = 0  # computed before, counted when the request leaves its slot
        self.num_running = 0
        self.acknowledged = 0  # last plan of this epoch whose result is here
        self._num_started = 0
        self._running_slots: Slots | None = None  # while nobody comes or goes

    @property
    def running_slots(self) -> Slots:
        """Slots of running requests [num_running], ascending."""
        if self._running_slots is None:
            self._running_slots = self.columns.running.nonzero()[0]
        return self._running_slots

    @property
    def last_started(self) -> Request:
        """Of the running requests the one that was admitted last."""
        slots = self.running_slots
        request = self.columns.requests[int(slots[self.columns.started[slots].argmax()])]
        assert request is not None
        return request

    def in_flight_still(self, request: Request) -> bool:
        """Whether a plan that is not acknowledged has a row of this request."""
        return request.slot >= 0 and bool(self.columns.last_seq[request.slot] > self.acknowledged)

    @property
    def num_preemptions(self) -> int:
        return sum(self.preemptions.values())

    @property
    def queue(self) -> WaitingQueue:
        """Where the next newcomer is taken from."""
        return self.probation.queue if self.probation.active else self.waiting

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.probation.num_waiting

    def start(self, request: Request) -> None:
        """The request, attached to its slot already, leaves the queue and runs."""
        self.queue.discard(request)
        self._num_started += 1
        self.columns.started[request.slot] = self._num_started
        self.columns.running[request.slot] = True
        self.num_running += 1
        self._running_slots = None

    def preempt(self, request: Request, *, offload: bool) -> None:
        """Take its slot and blocks; it waits in front with what it has. Tokens of plans already
        sent are still appended, so it leaves the slot when the last of them is acknowledged."""
        self._stop(request)
        request.resumed = True
        request.num_preemptions += 1
        self.preemptions["offload" if offload else "recompute"] += 1
        if self.in_flight_still(request):
            self.leaving.add(request.slot)
        else:
            self._leave(request, keep_tokens=True)
        self._wait(request)

    def finish(self, request: Request) -> None:
        """The one way out, for success, failure and cancel alike."""
        if request.finished:
            return
        request.finished = True
        self.waiting.discard(request)
        self.probation.discard(request)
        if request.slot >= 0:
            if self.columns.running[request.slot]:
                self._stop(request)
            self.leaving.discard(request.slot)
            self._leave(request, keep_tokens=False)
        else:
            request.num_final_tokens = len(request.tokens)

    def acknowledge(self, plan: Plan) -> None:
        """The plan is done: what it retired is free, what it wrote is certain."""
        self.in_flight.remove(plan)
        self.acknowledged = plan.seq
        self.columns.give_back(plan.retired_slots)
        self.kv.acknowledge(plan.seq)

    def settle(self) -> None:
        """After a plan's tokens are appended: preempted requests of which nothing is in flight
        any more leave their old slots."""
        for slot in list(self.leaving):
            request = self.columns.requests[slot]
            if request is not None and not self.in_flight_still(request):
                self.leaving.remove(slot)
                self._leave(request, keep_tokens=True)

    def computing(self, plans: Iterable[Plan]) -> list[Request]:
        """Requests that have a row in any of the plans, each once."""
        slots = dict.fromkeys(slot for plan in plans for slot in plan.slots.tolist())
        requests = map(self.columns.requests.__getitem__, slots)
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
            self._leave(request, keep_tokens=True)
            request.resumed = True
            if columns.running[slot]:
                out.append(request)
        columns.running[:] = False
        self.num_running = self.acknowledged = 0
        self._running_slots = None
        self.to_retire.clear()
        self.in_flight.clear()
        self.leaving.clear()
        columns.clear()
        self.kv.reset_unacknowledged()
        return out

    def next_epoch(self) -> list[Request]:
        """Every plan is answered, and the numbers begin anew: slots to be retired are free, blocks
        and requests stay where they are. Returns the running ones, to be admitted again."""
        assert not self.in_flight and not self.leaving
        columns, slots = self.columns, self.running_slots
        columns.give_back(np.array(self.to_retire, np.int32))
        self.to_retire.clear()
        self.acknowledged = 0
        columns.last_seq[:] = 0
        columns.num_forced[slots] = columns.num_tokens[slots]
        self.kv.next_epoch()
        running = [columns.requests[slot] for slot in slots.tolist()]
        for request in running:
            assert request is not None
            request.resumed = True
        return [request for request in running if request is not None]

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
        running = set(self.running_slots.tolist())
        free, retiring = set(columns.free), set(self.to_retire) | flying
        assert running == set(np.flatnonzero(columns.running).tolist()), "running slots are stale"
        assert len(running) == self.num_running, "running requests are miscounted"
        assert len(free) == columns.num_free, "a slot is free twice"
        assert not free & (attached | retiring), "a slot is free and in use"
        assert running <= attached, "a running slot has no request"
        assert len(free) + len(running | retiring) == columns.max_slots, "lost slots"
        assert columns.top == max(attached, default=-1) + 1, (
            "the top is not the highest slot in use"
        )
        for slot in attached:
            request = columns.requests[slot]
            assert request is not None and request.slot == slot and not request.finished
            kv = columns.kv[slot]
            assert kv is not None
            if slot in running:
                assert kv.live and kv.row == slot
                room = kv.num_blocks * self.kv.block_size
                assert columns.num_computed_tokens[slot] <= room, "computed beyond its blocks"
        if not self.in_flight:
            assert (columns.last_seq <= self.acknowledged).all(), "a plan was lost"
            awaited = columns.num_expected - columns.num_tokens
            assert not awaited[list(attached)].any(), "tokens of no plan are awaited"
            wanted = columns.wanted[self.running_slots]
            assert (wanted >= 1).all(), "a running request wants nothing"
        for request in live:
            in_slot = request.slot >= 0
            queued = request in self.waiting or self.probation.holds(request)
            assert not request.finished and (in_slot or queued), "a request was forgotten"
        self.kv.check()
        if not attached and not self.kv.num_fenced:
            assert self.kv.num_used == 0, f"{self.kv.num_used} blocks held by nobody"

    def _leave(self, request: Request, *, keep_tokens: bool) -> None:
        computed = request.num_computed_tokens
        again = min(computed, request.num_reached) - request.num_hit
        self.num_recomputed_tokens += max(again, 0)
        request.num_reached = max(request.num_reached, computed)
        self.columns.detach(request, keep_tokens=keep_tokens)

    def _stop(self, request: Request) -> None:
        slot = request.slot
        kv = self.columns.kv[slot]
        assert kv is not None
        self.kv.release(kv)
        self.columns.running[slot] = False
        self.num_running -= 1
        self._running_slots = None
        self.to_retire.append(slot)

    def _wait(self, request: Request) -> None:
        if self.probation.is_member(request):
            self.probation.queue.push(request)
        else:
            self.waiting.push(request)
