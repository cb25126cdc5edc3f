"""The worker's loop: introduce it to the scheduler, run its plans, tell it that it lives.

Knows frames and one link, nothing of how a step is computed. The worker outlives a
scheduler: weights, KV and named blocks stay, and it introduces itself to whoever comes next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from quire.errors import StartupError
from quire.link import WorkerLink
from quire.v1 import step_pb2 as pb

log = logging.getLogger("quire.worker")

HEARTBEAT_S = 1.0
SILENCE_S = 3.0  # without a word from the scheduler before the worker introduces itself again
HUNG_S = 10.0  # a step may outlive the scheduler's patience by this: its worker still comes back
_POLL_S = 0.2  # how often `stop` is looked at


class Executor(Protocol):
    """What the loop needs of a worker, real or simulated."""

    def hello(self) -> pb.Hello: ...

    def execute(
        self, plan: pb.StepPlan, received_ns: int | None = None
    ) -> pb.StepResult | pb.Ack: ...

    def heartbeat(self) -> pb.Heartbeat: ...

    def frame_dropped(self) -> None: ...

    @property
    def fatal(self) -> str: ...

    @property
    def highest_epoch(self) -> int: ...


def serve(
    worker: Executor,
    link: WorkerLink,
    stop: threading.Event,
    on_hung: Callable[[str], None] | None = None,
) -> None:
    """Run plans until `stop` is set or the scheduler sends Shutdown.

    `on_hung` is called from another thread, with the reason, when a step outlives the deadline of
    its plan by HUNG_S.

    Raises StartupError when the scheduler refuses this worker, and RuntimeError when the device
    can't be used any more. Closes the link.
    """
    done = threading.Event()
    loop = _Loop(worker, link)
    beat = threading.Thread(
        target=_beat, args=(loop, done, on_hung), name="quire-worker-heartbeat", daemon=True
    )
    beat.start()
    try:
        loop.run(stop)
    finally:
        done.set()
        beat.join(timeout=2)
        link.close()


def _beat(loop: _Loop, done: threading.Event, on_hung: Callable[[str], None] | None) -> None:
    """A heartbeat a second, from a thread of its own: a long step must not silence it."""
    link = loop.link
    before = time.monotonic()
    while not done.wait(HEARTBEAT_S):
        now, deadline = time.monotonic(), loop.deadline_ns
        stopped, before = now - before > 3 * HEARTBEAT_S, now  # the process itself stood still
        if on_hung is not None and deadline and not stopped and now > deadline / 1e9 + HUNG_S:
            on_hung("a step has outlived its deadline")
        if getattr(link, "connected", True):
            try:
                link.send(pb.WorkerFrame(heartbeat=loop.worker.heartbeat()).SerializeToString())
            except Exception:
                log.exception("no heartbeat")


class _Loop:
    def __init__(self, worker: Executor, link: WorkerLink) -> None:
        self.worker = worker
        self.link = link
        self.welcomed = False
        self.heard = time.monotonic()  # when the scheduler last said anything
        self.introduced = 0.0  # when the last Hello left
        self.deadline_ns = 0  # of the plan in hand, monotonic; 0 = none
        self.generation = -1  # of the link's connection that has had its Hello

    def run(self, stop: threading.Event) -> None:
        link = self.link
        self.introduce_if_needed()
        while not stop.is_set():
            frame = link.recv(_POLL_S)
            if frame is None:
                # Only now: after a long step the scheduler's words may be waiting to be read.
                self.introduce_if_needed()
                continue
            arrived = getattr(link, "received_ns", 0) or time.monotonic_ns()
            message = pb.SchedulerFrame()
            try:
                message.ParseFromString(frame)
            except DecodeError:
                log.warning("dropped a frame of %d bytes that is no SchedulerFrame", len(frame))
                self.worker.frame_dropped()
                continue
            if not self.handle(message, arrived):
                return

    def handle(self, message: pb.SchedulerFrame, arrived: int) -> bool:
        """False when the loop is to end."""
        kind = message.WhichOneof("message")
        if kind == "plan":
            allowed = message.plan.deadline_ms
            self.deadline_ns = arrived + allowed * 1_000_000 if allowed else 0
            answer = self.worker.execute(message.plan, arrived)
            self.deadline_ns = 0
            if isinstance(answer, pb.Ack):  # another rank gives the result
                frame = pb.WorkerFrame(ack=answer)
            else:
                frame = pb.WorkerFrame(result=answer)
            self.link.send(frame.SerializeToString())
            if self.worker.fatal:
                raise RuntimeError(self.worker.fatal)
        elif kind == "welcome":
            if not self.welcomed:
                log.info("serving a scheduler in epoch %d", message.welcome.epoch)
            self.welcomed = True
        elif kind == "heartbeat":
            epoch = message.heartbeat.epoch
            if not epoch or epoch < self.worker.highest_epoch:
                self.welcomed = False  # it does not know us: it has begun anew, or given us up
        elif kind == "refusal":
            raise StartupError(
                "config_error", f"the scheduler refused this worker: {message.refusal.reason}"
            )
        elif kind == "shutdown":
            log.info("the scheduler says goodbye: %s", message.shutdown.reason)
            return False
        else:
            self.worker.frame_dropped()
            return True
        self.heard = time.monotonic()
        return True

    def introduce_if_needed(self) -> None:
        """Send a Hello on a new connection, and once a second until somebody answers it."""
        if not getattr(self.link, "connected", True):
            return
        now = time.monotonic()
        generation = getattr(self.link, "generation", 0)
        if generation != self.generation:
            self.generation, self.welcomed, self.introduced = generation, False, 0.0
        silent = now - self.heard > SILENCE_S
        if (self.welcomed and not silent) or now - self.introduced < HEARTBEAT_S:
            return
        self.introduced = now
        self.link.send(pb.WorkerFrame(hello=self.worker.hello()).SerializeToString())
