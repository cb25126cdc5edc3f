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
from collections import deque

import numpy as np

from quire.latency_table import LatencyTable
from quire.step_cost import StepSize
from quire.v1 import step_pb2 as pb
from quire.version import __version__
from quire.wire import PROTOCOL_VERSION
from quire_worker.columns import Limits, PlanColumns, PlanError, block_names, ids, read_columns
from quire_worker.simulated import tokens as hashing
from quire_worker.simulated.memory import SimulatedMemory, Violation
from quire_worker.simulated.slots import Slots
from quire_worker.simulated.times import StepTimes

RESULTS_KEPT = 8
_U32 = (1 << 32) - 1


class SimulatedWorker:
    """One rank of a group of `tp_size`. One thread executes; hello and heartbeat may be called
    beside it. Ranks but the first answer with an Ack."""

    def __init__(
        self, table: LatencyTable, *, rank: int = 0, tp_size: int = 1, seed: int = 0
    ) -> None:
        self.table, self.rank, self.tp_size = table, rank, tp_size
        self.limits = Limits(
            table.max_slots,
            table.num_blocks,
            table.block_size,
            table.max_model_len,
            table.vocab_size,
        )
        self.memory = SimulatedMemory(table.num_blocks, table.block_size, table.num_host_blocks)
        self.columns = Slots(self.limits)
        self.times = StepTimes(table.points, seed)
        self.worker_epoch = secrets.randbits(63) | 1
        self.epoch = 0  # of the last plan executed
        self.highest_epoch = 0  # seen in any plan
        self.last_seq = 0
        self.broken = ""  # why the rest of the epoch is refused
        self.fatal = ""  # a simulated device does not die
        self.num_steps = 0
        self.num_dropped = 0
        self.violations: list[str] = []
        self.check_reads = True
        self.results: deque[pb.StepResult] = deque(maxlen=RESULTS_KEPT)
        self._started_ns = 0  # when the step in hand began, 0 = idle
        self._ended_ns = time.monotonic_ns()
        self._never = threading.Event()

    # -- what daemon.serve asks for ---------------------------------------------------------
    def hello(self) -> pb.Hello:
        """Who this is, what it holds, and the highest epoch it has seen."""
        table, memory = self.table, self.memory
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
            highest_epoch=self.highest_epoch,
            last_seq=self.last_seq,
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
            for size, micros in self.times.hello_points(self.table.max_model_len)
        ]

    def execute(self, plan: pb.StepPlan, received_ns: int | None = None) -> pb.StepResult | pb.Ack:
        """Run one plan in real time; the answer of this rank."""
        begin = self._started_ns = time.monotonic_ns()
        queue = begin - received_ns if received_ns else 0
        ran = self.num_steps
        result, seconds = self.step(plan)
        if self.num_steps > ran:
            seconds += self.table.step_overhead_micros * 1e-6
            self._never.wait(max(seconds - (time.monotonic_ns() - begin) * 1e-9, 0.0))
            result.timings.queue_micros = min(max(queue, 0) // 1000, _U32)
            result.timings.idle_micros = min(max(begin - self._ended_ns, 0) // 1000, _U32)
        self._ended_ns, self._started_ns = time.monotonic_ns(), 0
        return result if self.rank == 0 else as_ack(result)

    def heartbeat(self) -> pb.Heartbeat:
        """That this worker lives, how long the step in hand has run, and a metrics page."""
        started = self._started_ns
        return pb.Heartbeat(
            epoch=self.epoch,
            last_seq=self.last_seq,
            busy_micros=(time.monotonic_ns() - started) // 1000 if started else 0,
            metrics=b'quire_worker_steps_total{status="ok"} %d\n' % self.num_steps,
        )

    def frame_dropped(self) -> None:
        self.num_dropped += 1

    # -- plans ------------------------------------------------------------------------------
    def step(self, plan: pb.StepPlan) -> tuple[pb.StepResult, float]:
        """(the result, seconds the step takes). Never raises for what a plan says."""
        refused = self._gate(plan)
        if refused is not None:
            return refused, 0.0
        self.last_seq = plan.seq
        seconds = 0.0
        why = self.trouble(plan)
        if not why:
            result = self._answer(plan, pb.STEP_STATUS_OK)
            try:
                seconds = self._run(plan, result)
            except PlanError as error:
                self.violations.append(str(error))
                why = f"plan {plan.seq} of epoch {plan.epoch}: {error}"
        if why:
            result = self._answer(plan, pb.STEP_STATUS_FAILED, why)
            self.broken = why
        self.results.append(result)
        return result, seconds

    def trouble(self, plan: pb.StepPlan) -> str:
        """Why this step is to fail though nothing is wrong with it; '' = it does not. For tests
        that override it."""
        return ""

    def row_trouble(self, slot: int) -> str:
        """The error that a newly admitted slot is to fail with alone; '' = none. For tests."""
        return ""

    def _gate(self, plan: pb.StepPlan) -> pb.StepResult | None:
        """An answer when the plan is not to be executed. Begins a new epoch."""
        epoch, seq = plan.epoch, plan.seq
        self.highest_epoch = max(self.highest_epoch, epoch)
        if epoch < self.epoch or epoch == 0:
            return self._refused(plan, f"epoch {epoch} is over; this worker is in {self.epoch}.")
        if epoch > self.epoch:
            if seq != 1:
                return self._refused(plan, f"epoch {epoch} begins with plan {seq}, not 1.")
            self.epoch, self.last_seq, self.broken = epoch, 0, ""
            self.columns.clear()
            self.memory.forget_slots()
            self.results.clear()
        if seq <= self.last_seq:
            for result in self.results:
                if result.seq == seq:
                    return result
            return self._refused(plan, f"plan {seq} was executed long ago; its result is gone.")
        if seq != self.last_seq + 1 and not self.broken:
            self.broken = f"plan {self.last_seq + 1} is missing: {seq} came after {self.last_seq}."
        return self._refused(plan, self.broken) if self.broken else None

    def _refused(self, plan: pb.StepPlan, why: str) -> pb.StepResult:
        return self._answer(plan, pb.STEP_STATUS_REFUSED, why)

    def _answer(self, plan: pb.StepPlan, status: pb.StepStatus, error: str = "") -> pb.StepResult:
        return pb.StepResult(
            epoch=plan.epoch,
            seq=plan.seq,
            worker_epoch=self.worker_epoch,
            status=status,
            error=error,
        )

    # -- one step ---------------------------------------------------------------------------
    def _run(self, plan: pb.StepPlan, result: pb.StepResult) -> float:
        """The step on slots and memory, its result filled in; the seconds it takes."""
        cols = read_columns(plan, self.limits)
        for slot in cols.retired_slots.tolist():
            blocks = self.columns.blocks(slot)
            self.columns.retire(slot)
            self.memory.release(slot, blocks)
        seconds = sum(self._kv_op(op, plan.seq) for op in plan.kv_ops)
        result.kv_ops_done.extend(op.op_id for op in plan.kv_ops)
        newcomers = self._admit(plan, cols)
        errors = {s: name for s, _ in newcomers if (name := self.row_trouble(s))}
        self.columns.finished[list(errors)] = True
        live, size = self._compute(cols)
        if self.check_reads:
            for slot, shared in newcomers:
                if shared and not self.columns.finished[slot]:
                    self._check_shared(slot, shared)
        names = cols.block_names.tobytes()
        for i, block in enumerate(cols.named_block_ids.tolist()):
            if self.memory.filled[block] == 0 and self._was_skipped(block):
                continue  # its row did not run: nothing to name
            self.memory.name(block, names[16 * i : 16 * i + 16])
        self._sample(cols, live, errors, result)
        if len(cols.slots):
            seconds += self.times.draw(size)
        result.timings.forward_micros = min(round(seconds * 1e6), _U32)
        self.num_steps += 1
        return seconds

    def _kv_op(self, op: pb.KvOp, seq: int) -> float:
        """Seconds that the order takes."""
        if op.fence_seq >= seq:
            raise Violation(f"the fence {op.fence_seq} of order {op.op_id} is not reached")
        memory, device, host = self.memory, self.limits.num_blocks, self.table.num_host_blocks
        names = [bytes(name) for name in block_names(op.block_names, "kv_ops.block_names")]
        if op.kind == pb.KV_OP_KIND_ZERO:
            memory.zero(ids(op.dst_block_ids, device, "kv_ops.dst_block_ids"))
            return 0.0
        if op.kind not in (pb.KV_OP_KIND_OFFLOAD, pb.KV_OP_KIND_LOAD):
            raise Violation(f"a simulated worker can't do {pb.KvOpKind.Name(op.kind)}")
        out = op.kind == pb.KV_OP_KIND_OFFLOAD
        source = ids(op.src_block_ids, device if out else host, "kv_ops.src_block_ids")
        target = ids(op.dst_block_ids, host if out else device, "kv_ops.dst_block_ids")
        if len(source) != len(target) or len(names) not in (0, len(source)):
            raise Violation(f"order {op.op_id} has columns of different lengths")
        (memory.offload if out else memory.load)(source, target, names)
        return len(source) * self.table.copy_micros * 1e-6

    def _admit(self, plan: pb.StepPlan, cols: PlanColumns) -> list[tuple[int, int]]:
        """Newcomers and new blocks: (slot, shared blocks) of each newcomer. Blocks change hands
        before any are shared: within a step a block may be both one row's and another's to read."""
        columns, memory = self.columns, self.memory
        newcomers = [(admit.slot, columns.admit(admit)) for admit in plan.admit]
        own = [columns.blocks(slot)[shared:] for slot, shared in newcomers]
        takers = [np.full(len(b), s, np.int32) for (s, _), b in zip(newcomers, own, strict=True)]
        columns.append_blocks(cols.new_block_rows, cols.new_block_ids)
        memory.take(
            np.concatenate((*own, cols.new_block_ids)),
            np.concatenate((*takers, cols.new_block_rows)),
        )
        for slot, shared in newcomers:
            memory.share(columns.blocks(slot)[:shared])
        return newcomers

    def _compute(self, cols: PlanColumns) -> tuple[np.ndarray, StepSize]:
        """Write what the rows compute and count it: (bool [num_rows] which ran, their size)."""
        columns, block_size = self.columns, self.limits.block_size
        if not columns.in_use[cols.slots].all():
            free = int(cols.slots[~columns.in_use[cols.slots]][0])
            raise Violation(f"a row for free slot {free}")
        live = ~columns.finished[cols.slots]
        slots, nums = cols.slots[live], cols.num_tokens[live]
        starts = columns.num_computed[slots]
        ends = starts + nums
        self._check_rows(slots, ends, cols.flags[live])
        last = (nums == 1) & (ends == columns.num_tokens[slots])  # decodes, for the most part
        at, rows = ends[last] - 1, slots[last]
        self.memory.write_last(
            rows, columns.table[rows, at // block_size], at % block_size, columns.state[rows]
        )
        for i in np.flatnonzero(~last).tolist():
            slot, start, end = int(slots[i]), int(starts[i]), int(ends[i])
            states = columns.by_slot[slot].states[start:end]
            if len(states) < end - start:
                raise Violation(f"slot {slot} computes several tokens of its own output")
            part = columns.table[slot, start // block_size : -(-end // block_size)]
            self.memory.write_span(slot, part, start, states)
        columns.num_computed[slots] = ends
        wide = nums.astype(np.int64)
        attended = wide * ends - wide * (wide - 1) // 2
        sampled = int(((cols.flags[live] & pb.ROW_FLAG_SAMPLE) != 0).sum())
        return live, StepSize(int(nums.sum()), int(ends.sum()), int(attended.sum()), sampled)

    def _check_rows(self, slots: np.ndarray, ends: np.ndarray, flags: np.ndarray) -> None:
        known = self.columns.num_tokens[slots]
        room = self.columns.num_blocks[slots] * self.limits.block_size
        samples = (flags & pb.ROW_FLAG_SAMPLE) != 0
        for wrong, what in (
            (ends > known, "computes tokens that nobody knows yet"),
            (ends > room, "has a block table shorter than its tokens"),
            (samples != (ends == known), "has a wrong SAMPLE flag"),
        ):
            if wrong.any():
                i = int(wrong.argmax())
                raise Violation(f"row of slot {slots[i]} {what} ({ends[i]} of {known[i]})")

    def _check_shared(self, slot: int, shared: int) -> None:
        size, request = self.limits.block_size, self.columns.by_slot[slot]
        states = request.states[size - 1 : shared * size : size]
        self.memory.check_shared(request.request_id, self.columns.blocks(slot)[:shared], states)

    def _was_skipped(self, block: int) -> bool:
        finished = [s for s in self.columns.by_slot if self.columns.finished[s]]
        return any(block in self.columns.blocks(slot) for slot in finished)

    def _sample(
        self, cols: PlanColumns, live: np.ndarray, errors: dict[int, str], result: pb.StepResult
    ) -> None:
        """Draw the tokens of the rows that sample, and write the result's columns."""
        columns, table = self.columns, self.table
        asked = (cols.flags & pb.ROW_FLAG_SAMPLE) != 0
        slots, flags, runs = cols.slots[asked], cols.flags[asked], live[asked]
        pools = runs & ((flags & pb.ROW_FLAG_POOL) != 0)
        draws = runs & ~pools
        rows = slots[draws]
        tokens = hashing.next_tokens(
            columns.state[rows],
            columns.key[rows],
            table.vocab_size,
            table.eos_every,
            table.eos_token_id,
        )
        columns.append_tokens(rows, tokens)
        finished = ~runs
        finished[draws] = columns.stops(rows, tokens, table.eos_token_id)
        columns.finished[slots[finished]] = True
        result.slots = slots.astype("<i4").tobytes()
        result.num_outputs = draws.astype(np.uint8).tobytes()
        result.token_ids = tokens.astype("<i4").tobytes()
        result.finished = finished.astype(np.uint8).tobytes()
        if pools.any():
            vectors = [hashing.embedding(columns.by_slot[s].tokens) for s in slots[pools].tolist()]
            result.pooled = np.array(vectors, "<f4").tobytes()
        if (flags[draws] & pb.ROW_FLAG_LOGPROBS).any():
            self._logprobs(rows, flags[draws], tokens, result)
        for slot, name in errors.items():
            row = result.row_errors.add(slot=slot)
            row.error.name, row.error.message = name, f"slot {slot} failed alone"

    def _logprobs(
        self, rows: np.ndarray, flags: np.ndarray, tokens: np.ndarray, result: pb.StepResult
    ) -> None:
        """Made-up values of the right shape: the sampled token first."""
        counts, token_ids, values = [], [], []
        for slot, flag, token in zip(rows.tolist(), flags.tolist(), tokens.tolist(), strict=True):
            top = self.columns.by_slot[slot].logprobs
            count = top + 1 if flag & pb.ROW_FLAG_LOGPROBS and top is not None else 0
            counts.append(count)
            token_ids += [(token + i) % self.table.vocab_size for i in range(count)]
            values += [-0.5 * (i + 1) for i in range(count)]
        result.logprobs.counts = np.array(counts, "<u4").tobytes()
        result.logprobs.token_ids = np.array(token_ids, "<i4").tobytes()
        result.logprobs.logprobs = np.array(values, "<f4").tobytes()
        result.logprobs.ranks = np.array([bool(c) for c in counts], "<u4").tobytes()


def as_ack(result: pb.StepResult) -> pb.Ack:
    """What ranks other than the first answer."""
    return pb.Ack(
        epoch=result.epoch,
        seq=result.seq,
        worker_epoch=result.worker_epoch,
        status=result.status,
        error=result.error,
    )
