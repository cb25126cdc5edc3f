"""World: virtual time, an event queue, and groups of a real scheduler engine with a simulated
worker each.

Nothing sleeps and no thread runs: the clock jumps to the next event. A group's frames are the very
ones of the step wire. Knows requests by number; what they got is told to a Ledger.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.config import EngineConfig
from quire.latency_table import LatencyTable
from quire.sampling import SamplingParams
from quire.simulation.ledger import Ledger
from quire.simulation.trace import Arrival
from quire.v1 import step_pb2

if TYPE_CHECKING:
    from quire_scheduler.engine import Engine
    from quire_scheduler.outputs import Outputs

BEGIN_S = 1.0  # of the clock: 0 stands for "never" here and there
MIN_WAIT_S = 1e-6  # so that time gets on, whatever a float rounds to
PEER = b"simulated"
Event = tuple[float, int, Callable[[], None]]  # when, tie-breaker, what


class World:
    """Single-threaded. `now` is the clock of all groups, in seconds."""

    def __init__(self) -> None:
        self.now = BEGIN_S
        self.num_events = 0
        self._events: list[Event] = []
        self._order = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call `what` when the clock says `when`, after what was asked for earlier."""
        self._order += 1
        heapq.heappush(self._events, (max(when, self.now), self._order, what))

    def run(self, until: float) -> None:
        """Until nothing is left to happen, or the clock would pass `until`."""
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, what = heapq.heappop(events)
            self.num_events += 1
            what()


@dataclass(slots=True)
class VirtualLink:
    """The engine's end of a wire that costs half a round trip each way."""

    group: Group
    inbox: list[tuple[bytes, bytes]]
    num_malformed = 0

    def send(self, peer: bytes, frame: bytes) -> bool:
        self.group.on_frame(frame)
        return True

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        frames, self.inbox = self.inbox, []
        return frames

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Group:
    """One engine and its worker. Turned by events: a frame, a submission, a plan that is due."""

    def __init__(
        self, world: World, config: EngineConfig, table: LatencyTable, ledger: Ledger, seed: int
    ) -> None:
        from quire_scheduler.engine import Engine
        from quire_worker.simulated.worker import SimulatedWorker

        self.world, self.table, self.ledger = world, table, ledger
        self.link = VirtualLink(self, [])
        self.engine: Engine = Engine(config, self.link, clock=lambda: world.now)
        self.worker = SimulatedWorker(table, seed=seed)
        self.peak_blocks = 0
        self._busy_until = 0.0
        self._ended = 0.0
        self._arrives = 0.0  # when the last answer does
        self._due = float("inf")  # when the timer that counts goes off
        hello = step_pb2.WorkerFrame(hello=self.worker.hello())
        self.link.inbox.append((PEER, hello.SerializeToString()))
        self.engine.turn(0)

    # -- the worker's side ------------------------------------------------------------------
    def on_frame(self, frame: bytes) -> None:
        """A frame from the engine. What the worker makes of a plan depends on the order of plans
        alone, so it runs at once; only the answer has to wait for its time."""
        message = step_pb2.SchedulerFrame.FromString(frame)
        if message.WhichOneof("message") != "plan":
            return
        times = self.worker.steps.times
        wire = 0.5 * times.pick(self.table.round_trip_micros)
        result, seconds = self.worker.step(message.plan)
        there = self.world.now + wire
        begin = max(there, self._busy_until)
        idle = begin - self._ended
        self._ended = self._busy_until = begin + seconds
        self._busy_until += times.pick(self.table.step_overhead_micros)
        if result.status == step_pb2.STEP_STATUS_OK:
            result.timings.queue_micros = round((begin - there) * 1e6)
            result.timings.idle_micros = min(round(idle * 1e6), 1 << 31)
        answer = step_pb2.WorkerFrame(result=result).SerializeToString()
        self._arrives = max(self._busy_until + wire, self._arrives)  # frames keep their order
        self.world.at(self._arrives, lambda: self._answered(answer))

    def _answered(self, frame: bytes) -> None:
        self.link.inbox.append((PEER, frame))
        self.turn()

    # -- the engine's side ------------------------------------------------------------------
    def submit(self, number: int, arrival: Arrival) -> None:
        """A request reaches the scheduler."""
        from quire_scheduler.request import Submission

        model = self.engine.model()
        assert model is not None
        params = SamplingParams(
            max_tokens=arrival.num_output_tokens, ignore_eos=True, seed=number & 0x7FFFFFFF
        )
        self.engine.submit(
            self,
            Submission(
                handle=number,
                prompt_token_ids=arrival.prompt(model.block_size, model.vocab_size),
                params=params,
                request_id=arrival.request_id[:500],
                priority=arrival.priority,
            ),
        )
        self.turn()

    def deliver(self, outputs: Outputs) -> None:
        self.ledger.deliver(self, outputs, self.world.now)

    def turn(self) -> None:
        """One pass of the engine; then a timer for what is due without a frame."""
        self.engine.turn(0)
        self.peak_blocks = max(self.peak_blocks, self.engine.stats().num_blocks_used)
        wait = self.engine.next_due()
        if wait is None:
            self._due = float("inf")
            return
        due = self.world.now + max(wait, MIN_WAIT_S)
        if due != self._due:
            self._due = due
            self.world.at(due, lambda: self._on_timer(due))

    def _on_timer(self, due: float) -> None:
        if due == self._due:  # else another time was set since
            self._due = float("inf")
            self.turn()


class Router:
    """Which group gets a request: the one with least to do, or, with `prefix`, the one that its
    first tokens always lead to unless that has clearly more to do than others."""

    SLACK = 1.25  # a prefix's group may have so much more to do than the mean

    def __init__(self, groups: list[Group], policy: str) -> None:
        self.groups = groups
        self.by_prefix = policy == "prefix"
        self.load = np.zeros(len(groups))  # tokens of requests that run or wait

    def choose(self, arrival: Arrival, block_size: int) -> int:
        if len(self.groups) == 1:
            return 0
        least = int(self.load.argmin())
        if not self.by_prefix:
            return least
        home = _prefix_key(arrival, block_size) % len(self.groups)
        most = self.SLACK * self.load.mean() + arrival.num_prompt_tokens
        return home if self.load[home] <= most else least


def _prefix_key(arrival: Arrival, block_size: int) -> int:
    import hashlib

    if arrival.block_hashes:
        first = arrival.block_hashes[0]
    elif arrival.prompt_token_ids:
        first = repr(arrival.prompt_token_ids[:block_size]).encode()
    else:
        first = arrival.request_id.encode()
    return int.from_bytes(hashlib.blake2b(first, digest_size=8).digest(), "little")
