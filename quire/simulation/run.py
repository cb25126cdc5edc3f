"""One simulation: a trace, a latency table and settings in, a report out.

Knows how the parts are put together; the parts are in world, ledger, trace.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.config import EngineConfig
from quire.latency_table import LatencyTable
from quire.simulation.ledger import Ledger, Seen
from quire.simulation.trace import Arrival
from quire.simulation.world import BEGIN_S, Group, Router, World


@dataclass(frozen=True)
class Outcome:
    """The report is the same for the same input; the rest depends on this machine."""

    report: dict[str, Any]
    wall_s: float
    num_events: int
    ledger: Ledger

    @property
    def steps_per_s(self) -> float:
        """Plan and result pairs a second of real time."""
        return float(self.report["steps"]) / max(self.wall_s, 1e-9)


def simulate(
    arrivals: Sequence[Arrival],
    table: LatencyTable,
    config: EngineConfig,
    *,
    workers: int = 1,
    route: str = "load",
    seed: int = 0,
    max_time: float = float("inf"),
) -> Outcome:
    """Run the arrivals (in order of time) through `workers` groups for at most `max_time` virtual
    seconds. Raises AssertionError where an engine's books do not balance at the end."""
    # one run of this process is no server: nothing of it is recorded or traced
    config = dataclasses.replace(config, journal="", otlp_traces_endpoint="")
    table = table.sized(config)
    world = World()
    router = Router([], route)
    ledger = Ledger(table, router.load)
    groups = [Group(world, config, table, ledger, seed + i) for i in range(workers)]
    router = Router(groups, route)
    ledger.loads = router.load
    _Feed(world, arrivals, router, ledger).next()
    gc.collect()
    gc.freeze()  # what is there stays: the collector need not look at it again
    begin = time.perf_counter()
    try:
        world.run(BEGIN_S + max_time)
    finally:
        gc.unfreeze()
    wall = time.perf_counter() - begin
    for group in groups:
        group.engine.check()
    report = ledger.report(groups, world.now - BEGIN_S)
    for group in groups:
        group.engine.stop()
    return Outcome(report, wall, world.num_events, ledger)


class _Feed:
    """Puts one arrival at a time on the event queue."""

    def __init__(
        self, world: World, arrivals: Sequence[Arrival], router: Router, ledger: Ledger
    ) -> None:
        self.world, self.router, self.ledger = world, router, ledger
        self.arrivals = arrivals
        self.number = 0

    def next(self) -> None:
        if self.number < len(self.arrivals):
            arrival = self.arrivals[self.number]
            self.world.at(BEGIN_S + arrival.arrival_s, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        number, world = self.number, self.world
        group = self.router.choose(arrival, self.ledger.table.block_size)
        seen = Seen(arrival, group, world.now)
        self.ledger.seen.append(seen)
        self.router.load[group] += seen.load
        times = self.router.groups[group].worker.steps.times
        there = world.now + times.pick(self.ledger.table.submit_micros)
        world.at(there, lambda: self.router.groups[group].submit(number, arrival))
        self.number += 1
        self.next()
