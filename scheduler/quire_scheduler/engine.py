"""Engine: the loop that turns submissions into step plans and results into outputs.

Knows no gRPC and no ZeroMQ: frames come and go through a SchedulerLink, outputs leave through
Client.deliver. `start()` runs it in a thread of its own; `turn()` runs one pass, for tests.

Everything but the inbox, the counters and a few flags belongs to the thread that turns the loop.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from quire.config import EngineConfig
from quire.errors import InvalidRequest, QuireError
from quire.link import SchedulerLink
from quire.telemetry import Tracer
from quire.v1 import step_pb2
from quire_scheduler.admission import ModelInfo
from quire_scheduler.counters import Counters
from quire_scheduler.driver import Driver
from quire_scheduler.intake import Intake
from quire_scheduler.journal import Journal
from quire_scheduler.kv.explain import BlockInfo, explain_blocks, most_hit
from quire_scheduler.outputs import Client, Outputs
from quire_scheduler.request import Submission
from quire_scheduler.segment import Direction

log = logging.getLogger("quire.scheduler")
T = TypeVar("T")

SWITCH_INTERVAL_S = 0.0002
CHECK_AFTER_S = 1.0  # of idleness; the books are checked once after each spell of work
TICK_S = 0.25  # how long the loop sleeps at most
STILL_S = 2.0  # after which the health report says that the loop does not come round
STALL_S = 1.0  # a turn that took longer stood still: no worker is blamed for silence


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Blocks: total = used + cached + free."""

    num_running: int = 0
    num_waiting: int = 0
    preemptions: tuple[tuple[str, int], ...] = ()  # by kind
    num_requests: int = 0  # accepted since start
    num_blocks_total: int = 0
    num_blocks_used: int = 0  # held by requests
    num_blocks_cached: int = 0  # evictable
    max_requests: int = 0  # running and waiting; more are refused
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    evicted_blocks: int = 0
    grafted_blocks: int = 0
    output_tokens: int = 0
    malformed_frames: int = 0  # of the link: in another shape than (peer, frame)
    num_scheduled_tokens: int = 0
    num_recomputed_tokens: int = 0  # of those, computed before
    host_blocks_total: int = 0
    host_blocks_used: int = 0
    host_block_bytes: int = 0
    host_hit_tokens: int = 0
    offloaded_blocks: int = 0
    loaded_blocks: int = 0
    epoch: int = 0
    ready: bool = False  # a worker group is connected
    draining: bool = False
    healthy: bool = False
    problem: str = ""  # why not, naming the rank
    worker_metrics: tuple[tuple[int, bytes], ...] = ()  # (rank, Prometheus page)
    worker_memory_bytes: int = 0

    @property
    def num_preemptions(self) -> int:
        return sum(count for _, count in self.preemptions)


class Engine:
    """Give it a config and a link, `start()` it, and talk to it from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        link: SchedulerLink,
        *,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.crashed: BaseException | None = None
        self.on_crash: Callable[[], None] | None = None  # called once, on the engine thread
        self._link = link
        self._clock = clock
        self._journal = Journal(config, self.counters, clock) if config.journal else None
        self._driver = Driver(config, link, clock, self.counters, self._journal)
        self._intake = Intake(
            config,
            self.counters,
            tracer or Tracer("scheduler"),
            self._driver.add,
            self._driver.cancel,
        )
        self._last_turn = self._last_busy = clock()
        self._unchecked = False
        # shared with other threads
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake_pending = False
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- from any thread --------------------------------------------------------------------
    def start(self) -> None:
        """Run the loop in a thread of its own. Lowers the interpreter's switch interval: a busy
        thread beside the engine would cost each round trip up to 5 ms."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the loop; live requests are dropped without a word. Closes the link."""
        self._stopping = True
        self._link.wake()
        if self._thread is not None:
            self._thread.join(timeout)
        else:
            self._close()

    def submit(self, client: Client, submission: Submission) -> None:
        """Hand in a request; every answer, also a refusal, comes through client.deliver()."""
        self._post(
            lambda: self._intake.submit(
                client,
                submission,
                self._driver.model,
                self._clock(),
                draining=self._draining,
            )
        )

    def cancel(self, client: Client, handle: int, attempt: int = 0) -> None:
        """Drop a request of this attempt or an older one. Nothing more is delivered for it, and
        the first plan built after this call arrives does not hold it."""
        self._post(lambda: self._intake.cancel(client, handle, attempt, self._clock()))

    def detach(self, client: Client) -> None:
        """The client is gone: all its requests are cancelled, nothing more is delivered."""
        self._post(lambda: self._intake.detach(client, self._clock()))

    def drain(self, timeout: float) -> int:
        """Refuse new requests; wait until the accepted ones are done or the time is up. Returns
        how many are not. Refuses new ones for good."""
        deadline = time.monotonic() + timeout
        while True:
            # through the inbox, behind whatever was submitted before
            try:
                left = self._call(self._drain_on) if self.alive else self._drain_on()
            except RuntimeError:  # the engine ended meanwhile
                return self._intake.num_live
            if not left or time.monotonic() >= deadline or not self.alive:
                return left
            time.sleep(min(0.02, max(deadline - time.monotonic(), 0)))

    def stats(self) -> Stats:
        """Numbers of this moment; each is right, together they may be a step apart."""
        driver, now = self._driver, self._clock()
        state = driver.state
        kv = state.kv if state is not None else None
        host = kv.host if kv is not None else None
        problem = f"the engine stopped: {self.crashed!r}" if self.crashed else driver.problem(now)
        if self.alive and self.still_s > STILL_S:
            problem = f"the scheduler's engine has stood still for {self.still_s:.0f} s"
        workers = list(driver.group.workers.values())
        return Stats(
            num_running=state.num_running if state else 0,
            num_waiting=(state.num_waiting if state else 0) + self._intake.num_early,
            preemptions=tuple(state.preemptions.items()) if state else (),
            num_requests=self.counters.accepted,
            num_blocks_total=kv.num_usable if kv else 0,
            num_blocks_used=kv.num_used if kv else 0,
            num_blocks_cached=kv.num_cached if kv else 0,
            max_requests=self._intake.room,
            prefix_query_tokens=kv.stats.query_tokens if kv else 0,
            prefix_hit_tokens=kv.stats.hit_tokens if kv else 0,
            evicted_blocks=kv.stats.evicted_blocks if kv else 0,
            grafted_blocks=kv.stats.grafted_blocks if kv else 0,
            output_tokens=self.counters.output_tokens,
            malformed_frames=self._link.num_malformed,
            num_scheduled_tokens=self.counters.scheduled_tokens,
            num_recomputed_tokens=state.num_recomputed_tokens if state else 0,
            host_blocks_total=host.num_blocks if host else 0,
            host_blocks_used=host.num_used if host else 0,
            host_block_bytes=host.block_bytes if host else 0,
            host_hit_tokens=kv.stats.host_hit_tokens if kv else 0,
            offloaded_blocks=host.stats.offloaded if host else 0,
            loaded_blocks=host.stats.loaded if host else 0,
            epoch=driver.epoch,
            ready=driver.ready,
            draining=self._draining,
            healthy=not problem,
            problem=problem,
            worker_metrics=tuple((w.rank, w.metrics) for w in workers if w.metrics),
            worker_memory_bytes=sum(w.memory_bytes for w in workers),
        )

    def describe_blocks(
        self, block_ids: Sequence[int], limit: int, tier: str = "device"
    ) -> list[BlockInfo]:
        """These blocks of a tier; none given = up to `limit` of those most often found again. Waits
        for the engine thread. Raises QuireError."""

        def look() -> list[BlockInfo]:
            state = self._driver.state
            if state is None:
                raise QuireError("not_ready", "There are no blocks before a worker is there.")
            try:
                return explain_blocks(state.kv, block_ids or most_hit(state.kv, limit, tier), tier)
            except IndexError as error:
                raise InvalidRequest(f"{error}.", "block_ids") from None

        return self._call(look)

    def model(self) -> ModelInfo | None:
        """The model as the workers described it; None before the first Hello."""
        return self._driver.model

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def still_s(self) -> float:
        """Seconds since the loop last came round."""
        return self._clock() - self._last_turn

    def check(self) -> None:
        """Raise AssertionError or BlockAccountingError where the books do not balance."""
        if self.alive:
            self._call(self._check)
        else:
            self._check()

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        if not self._wake_pending:
            self._wake_pending = True
            self._link.wake()

    def _call(self, function: Callable[[], T]) -> T:
        """The function's result, run by the engine thread."""
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._post(run)
        while not done.wait(0.1):
            if not self.alive:
                raise RuntimeError("the engine thread is gone")
        if errors:
            raise errors[0]
        return results[0]

    # -- the loop ---------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn(TICK_S)
        except BaseException as error:
            self.crashed = error
            log.critical("the engine stopped: %r", error, exc_info=error)
            if self.on_crash is not None:
                self.on_crash()
        finally:
            self._close()

    def next_due(self) -> float | None:
        """Seconds until turn() has something to do though no frame comes; None: never. For who
        turns the loop by a clock of its own."""
        driver = self._driver
        idle = not driver.busy and not self._intake.num_live and not self._inbox
        return None if idle else driver.next_due(self._clock())

    def turn(self, timeout_s: float) -> None:
        """One pass: wait for frames, take what came in, send the plans that are due."""
        driver = self._driver
        frames = self._link.poll(min(timeout_s, driver.next_due(self._clock())))
        now = self._clock()
        if now - self._last_turn > STALL_S + timeout_s:
            driver.group.forgive(now - self._last_turn)
        self._take_inbox()
        for peer, frame in frames:
            self._on_frame(peer, frame, now)
        driver.watch(now)
        self._answer(now)
        while driver.due(self._clock()):
            self._take_inbox()  # a cancel that is here is absent from the plan built now
            if not driver.send_plan():
                break
        driver.deferred()
        self._answer(now)
        if self._journal is not None:
            self._journal.flush_if_due(time.monotonic_ns(), idle=not driver.busy)
        self._check_when_idle(now)
        self._last_turn = self._clock()

    def _check_when_idle(self, now: float) -> None:
        """A wrong book is a bug: better to end, and be started anew, than to serve from it."""
        if self._driver.busy or self._intake.num_live:
            self._last_busy, self._unchecked = now, True
        elif self._unchecked and now - self._last_busy > CHECK_AFTER_S:
            self._unchecked = False
            self._check()

    def _take_inbox(self) -> None:
        self._wake_pending = False
        while self._inbox:
            self._inbox.popleft()()

    def _on_frame(self, peer: bytes, frame: bytes, now: float) -> None:
        """Frames come from outside: whatever they hold, the loop goes on."""
        message = step_pb2.WorkerFrame()
        try:
            message.ParseFromString(frame)
        except DecodeError:
            self.counters.drop("malformed")
            return
        kind = message.WhichOneof("message")
        if kind in ("result", "ack"):
            self._record(frame)
        if kind == "hello":
            complete = self._driver.on_hello(peer, message.hello, now)
            if self._driver.group.by_peer(peer) is not None:
                self._record(frame)  # before the plans for it; one that was refused gets none
            if complete:
                model = self._driver.model
                assert model is not None
                self._intake.take_early(model, now)
        elif kind == "result":
            self._driver.on_answer(peer, message.result, now)
        elif kind == "ack":
            self._driver.on_answer(peer, message.ack, now)
        elif kind == "heartbeat":
            self._driver.on_heartbeat(peer, message.heartbeat, now)
        elif not frame:
            self._driver.probe(peer)  # the link saw a connection go
        else:
            self.counters.drop("empty")

    def _record(self, frame: bytes) -> None:
        if self._journal is not None:
            self._journal.append(Direction.WORKER, frame, self._clock())

    def _answer(self, now: float) -> None:
        """Deliver what the driver has for clients, and forget requests that ended."""
        deliveries, ended = self._driver.outbox.take()
        for number, outputs in deliveries:
            self._intake.deliver(number, outputs, now)
        for request in ended:
            self._intake.ended(request, now)

    def _drain_on(self) -> int:
        self._draining = True
        return self._intake.num_live

    def _check(self) -> None:
        state = self._driver.state
        self._intake.check()
        if state is not None:
            state.check(self._intake.live)

    def _close(self) -> None:
        self._link.close()
        if self._journal is not None:
            self._journal.close()


__all__ = ["Client", "Engine", "ModelInfo", "Outputs", "Stats", "Submission"]
