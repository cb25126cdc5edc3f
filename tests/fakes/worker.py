"""The simulated worker on a WorkerLink, pumped by hand or by a thread, and made to misbehave.

What it computes and the rules it checks are the product's (quire_worker.simulated); what is here is
how a test turns it: frames in and out, a death, steps and rows that fail on demand.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.latency_table import LatencyTable
from quire.link import WorkerLink
from quire.step_cost import attended
from quire.v1 import step_pb2 as pb
from quire.wire import PROTOCOL_VERSION
from quire_worker.simulated.slots import Slot
from quire_worker.simulated.tokens import embedding, oracle
from quire_worker.simulated.worker import SimulatedWorker, as_ack

NAME = 16


@dataclass
class Options:
    """How the worker looks and misbehaves."""

    num_blocks: int = 64
    block_size: int = 16
    num_host_blocks: int = 0
    copy_micros: int = 1
    max_slots: int = 32
    max_model_len: int = 512
    vocab_size: int = 997
    eos: int = 2
    eos_every: int = 0
    model: str = "fake"
    digest: str = "00" * 16
    rank: int = 0
    tp_size: int = 1
    step_costs: Sequence[tuple[int, int, int]] = ()
    latency: Callable[[int], float] | None = None  # step tokens -> seconds to sleep
    fail: Callable[[pb.StepPlan, FakeWorker], str] | None = None  # '' = run it, text = FAILED
    row_error: Callable[[Slot], str] | None = None  # '' = fine, else an error name
    check_reads: bool = True
    heartbeats: bool = False
    protocol_version: int = PROTOCOL_VERSION

    @property
    def table(self) -> LatencyTable:
        return LatencyTable(  # not checked: some tests want a worker that does not fit
            points=((1.0, 1.0, 1.0, 1.0, 100.0),),
            model=self.model,
            model_digest=self.digest,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            copy_micros=self.copy_micros,
            max_slots=self.max_slots,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_id=self.eos,
            eos_every=self.eos_every,
        )


class Simulated(SimulatedWorker):
    """Fails where the test's options say so."""

    def __init__(self, outer: FakeWorker) -> None:
        o = outer.options
        super().__init__(o.table, rank=o.rank, tp_size=o.tp_size)
        self.outer = outer

    def step_costs(self) -> list[pb.StepCost]:
        return [
            pb.StepCost(
                num_tokens=t, num_context_tokens=c, num_attended_tokens=attended(t, c), micros=m
            )
            for t, c, m in self.outer.options.step_costs
        ]

    def trouble(self, plan: pb.StepPlan) -> str:
        fail = self.outer.options.fail
        self.steps.check_reads = self.outer.options.check_reads
        return fail(plan, self.outer) if fail else ""

    def row_trouble(self, slot: int) -> str:
        row_error = self.outer.options.row_error
        return row_error(self.steps.columns.by_slot[slot]) if row_error else ""


@dataclass
class FakeWorker:
    """`pump()` runs what is there, for tests without threads; `start()` runs it in a thread."""

    link: WorkerLink
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.inner = Simulated(self)
        self.welcomes: list[int] = []
        self.refusal = ""
        self.plans: list[pb.StepPlan] = []  # executed, when `keep_plans`
        self.keep_plans = False
        self.dead = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what tests look at -----------------------------------------------------------------
    @property
    def worker_epoch(self) -> int:
        return self.inner.worker_epoch

    @property
    def highest_epoch(self) -> int:
        return self.inner.gate.highest_epoch

    @highest_epoch.setter
    def highest_epoch(self, value: int) -> None:
        self.inner.gate.highest_epoch = value

    @property
    def epoch(self) -> int:
        return self.inner.gate.epoch

    @property
    def last_seq(self) -> int:
        return self.inner.gate.last_seq

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def violations(self) -> list[str]:
        return self.inner.violations

    @property
    def slots(self) -> dict[int, Slot]:
        return self.inner.steps.columns.by_slot

    @property
    def names(self) -> dict[int, bytes]:
        return self.inner.steps.memory.names

    @property
    def host_names(self) -> dict[int, bytes]:
        return self.inner.steps.memory.host_names

    @property
    def num_copied(self) -> dict[str, int]:
        return self.inner.steps.memory.num_copied

    @property
    def results(self) -> Sequence[pb.StepResult]:
        return self.inner.gate.results

    # -- life -------------------------------------------------------------------------------
    def hello(self) -> None:
        self.send(pb.WorkerFrame(hello=self.hello_message()))

    def hello_message(self) -> pb.Hello:
        message = self.inner.hello()
        message.protocol_version = self.options.protocol_version
        message.system_fingerprint, message.device = "fp_fake", "fake"
        return message

    def send(self, frame: pb.WorkerFrame) -> None:
        if not self.dead:
            self.link.send(frame.SerializeToString())

    def pump(self, limit: int = 1000) -> int:
        """Handle up to `limit` frames that are there; how many there were."""
        done = 0
        while done < limit and not self.dead:
            frame = self.link.recv(0.0 if self._thread is None else 0.05)
            if frame is None:
                break
            self.on_frame(frame)
            done += 1
        return done

    def start(self) -> None:
        """Say Hello and serve in a thread until stop()."""
        self._thread = threading.Thread(target=self._run, name="fake-worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        said = beat = time.monotonic()
        self.hello()
        while not self._stop.is_set() and not self.dead:
            self.pump(1)
            if not self.welcomes and time.monotonic() - said > 0.2:
                said = time.monotonic()
                self.hello()
            if self.options.heartbeats and time.monotonic() - beat > 0.2:
                beat = time.monotonic()
                self.heartbeat()

    def heartbeat(self, busy_micros: int = 0, metrics: bytes = b"# worker page\n") -> None:
        beat = pb.Heartbeat(
            epoch=self.epoch, last_seq=self.last_seq, busy_micros=busy_micros, metrics=metrics
        )
        self.send(pb.WorkerFrame(heartbeat=beat))

    def die(self) -> None:
        """kill -9: not a word more."""
        self.dead = True

    # -- frames -----------------------------------------------------------------------------
    def on_frame(self, frame: bytes) -> None:
        message = pb.SchedulerFrame()
        message.ParseFromString(frame)
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self.welcomes.append(message.welcome.epoch)
        elif kind == "refusal":
            self.refusal = message.refusal.reason
        elif kind == "plan":
            result = self.execute(message.plan)
            if self.options.rank == 0:
                self.send(pb.WorkerFrame(result=result))
            else:
                self.send(pb.WorkerFrame(ack=as_ack(result)))

    def execute(self, plan: pb.StepPlan) -> pb.StepResult:
        ran = self.num_steps
        result, _ = self.inner.step(plan)
        if self.num_steps > ran:
            if self.keep_plans:
                self.plans.append(plan)
            if self.options.latency is not None:
                time.sleep(self.options.latency(sum(i32(plan.num_tokens))))
        return result


def i32(data: bytes) -> list[int]:
    return [int(v) for v in np.frombuffer(data, "<i4")]


def block_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """F3's chain, for tests that check names."""
    return hashlib.blake2b(previous + np.array(tokens, "<i4").tobytes(), digest_size=NAME).digest()


__all__ = ["FakeWorker", "Options", "block_name", "embedding", "i32", "oracle"]
