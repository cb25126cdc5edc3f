"""SimulatedWorker: executes step plans like the real one, on a memory of hashes.

Plans in order, each once; a rule that a plan breaks makes it FAILED, with the reason kept in
`violations`. `step()` says what a plan takes without taking it (virtual time); `execute()` sleeps
it (real time). Knows no sockets.
"""

from __future__ import annotations

import os
import secrets
import threading
import time

import numpy as np

from quire.latency_table import LatencyTable
from quire.v1 import step_pb2 as pb
from quire.version import __version__
from quire.wire import PROTOCOL_VERSION
from quire_worker.columns import PlanError
from quire_worker.gate import PlanGate
from quire_worker.simulated.step import Steps

_PAGE = b"""# HELP quire_worker_steps_total Plans answered, by status.
# TYPE quire_worker_steps_total counter
quire_worker_steps_total{status="ok"} %d
"""
_U32 = (1 << 32) - 1


class SimulatedWorker:
    """One rank of a group of `tp_size`. One thread executes; hello and heartbeat may be called
    beside it. Ranks but the first answer with an Ack."""

    def __init__(
        self, table: LatencyTable, *, rank: int = 0, tp_size: int = 1, seed: int = 0
    ) -> None:
        self.table, self.rank, self.tp_size = table, rank, tp_size
        self.steps = Steps(table, seed)
        self.worker_epoch = secrets.randbits(63) | 1
        self.gate = PlanGate(self.worker_epoch, self.steps.begin_epoch)
        self.fatal = ""  # a simulated device does not die
        self.num_steps = 0
        self.num_dropped = 0
        self.violations: list[str] = []
        self._started_ns = 0  # when the step in hand began, 0 = idle
        self._ended_ns = time.monotonic_ns()
        self._never = threading.Event()

    @property
    def highest_epoch(self) -> int:
        return self.gate.highest_epoch

    # -- what daemon.serve asks for ---------------------------------------------------------
    def hello(self) -> pb.Hello:
        """Who this is, what it holds, and the highest epoch it has seen."""
        table, memory = self.table, self.steps.memory
        held, held_host = sorted(memory.names), sorted(memory.host_names)
        tiers = [
            pb.TierSize(
                tier=pb.TIER_DEVICE, num_blocks=table.num_blocks, block_bytes=table.block_bytes
            )
        ]
        if table.num_host_blocks:
            tiers.append(
                pb.TierSize(
                    tier=pb.TIER_HOST,
                    num_blocks=table.num_host_blocks,
                    block_bytes=table.block_bytes,
                    copy_micros=table.copy_micros,
                )
            )
        return pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            rank=self.rank,
            tp_rank=self.rank,
            tp_size=self.tp_size,
            pp_rank=0,
            pp_size=1,
            worker_epoch=self.worker_epoch,
            highest_epoch=self.gate.highest_epoch,
            last_seq=self.gate.last_seq,
            model=table.model,
            model_digest=table.model_digest,
            dtype=table.dtype,
            kv_dtype=table.kv_dtype,
            block_size=table.block_size,
            tiers=tiers,
            max_slots=table.max_slots,
            max_model_len=table.max_model_len,
            vocab_size=table.vocab_size,
            eos_token_ids=[table.eos_token_id],
            device="simulated",
            attention_backend="none",
            step_costs=self.step_costs(),
            held_block_ids=np.array(held, "<i4").tobytes(),
            held_block_names=b"".join(memory.names[b] for b in held),
            held_host_block_ids=np.array(held_host, "<i4").tobytes(),
            held_host_block_names=b"".join(memory.host_names[b] for b in held_host),
            system_fingerprint="fp_simulated",
            pid=os.getpid(),
            software_version=__version__,
        )

    def step_costs(self) -> list[pb.StepCost]:
        return [
            pb.StepCost(
                num_tokens=size.num_tokens,
                num_context_tokens=size.num_context_tokens,
                num_attended_tokens=size.num_attended_tokens,
                micros=micros,
            )
            for size, micros in self.steps.times.hello_points(self.table.max_model_len)
        ]

    def execute(self, plan: pb.StepPlan, received_ns: int | None = None) -> pb.StepResult | pb.Ack:
        """Run one plan in real time; the answer of this rank."""
        begin = self._started_ns = time.monotonic_ns()
        queue = begin - received_ns if received_ns else 0
        ran = self.num_steps
        result, seconds = self.step(plan)
        if self.num_steps > ran:
            seconds += self.steps.times.pick(self.table.step_overhead_micros)
            self._never.wait(max(seconds - (time.monotonic_ns() - begin) * 1e-9, 0.0))
            result.timings.queue_micros = min(max(queue, 0) // 1000, _U32)
            result.timings.idle_micros = min(max(begin - self._ended_ns, 0) // 1000, _U32)
        self._ended_ns, self._started_ns = time.monotonic_ns(), 0
        return result if self.rank == 0 else as_ack(result)

    def heartbeat(self) -> pb.Heartbeat:
        """That this worker lives, how long the step in hand has run, and a metrics page."""
        started = self._started_ns
        return pb.Heartbeat(
            epoch=self.gate.epoch,
            last_seq=self.gate.last_seq,
            busy_micros=(time.monotonic_ns() - started) // 1000 if started else 0,
            metrics=_PAGE % self.num_steps,
        )

    def frame_dropped(self) -> None:
        self.num_dropped += 1

    # -- plans ------------------------------------------------------------------------------
    def step(self, plan: pb.StepPlan) -> tuple[pb.StepResult, float]:
        """(the result, seconds the step takes). Never raises for what a plan says."""
        refused = self.gate.check(plan)
        if refused is not None:
            return refused, 0.0
        seconds = 0.0
        why = self.trouble(plan)
        if not why:
            result = self.gate.answer(plan, pb.STEP_STATUS_OK)
            try:
                seconds = self.steps.run(plan, result, self.row_trouble)
                self.num_steps += 1
            except PlanError as error:
                self.violations.append(str(error))
                why = f"plan {plan.seq} of epoch {plan.epoch}: {error}"
        if why:
            result = self.gate.answer(plan, pb.STEP_STATUS_FAILED, why)
        self.gate.done(result)
        return result, seconds

    def trouble(self, plan: pb.StepPlan) -> str:
        """Why this step is to fail though nothing is wrong with it; '' = it does not. For tests
        that override it."""
        return ""

    def row_trouble(self, slot: int) -> str:
        """The error that a newly admitted slot is to fail with alone; '' = none. For tests."""
        return ""


def as_ack(result: pb.StepResult) -> pb.Ack:
    """What ranks other than the first answer."""
    return pb.Ack(
        epoch=result.epoch,
        seq=result.seq,
        worker_epoch=result.worker_epoch,
        status=result.status,
        error=result.error,
    )
