"""Runner: executes step plans in order, each exactly once, and says what came out.

Knows no sockets and no checkpoints: it is given a model, a KV cache and plans as messages.

Plans run strictly in order of seq within an epoch. What can't be executed is answered, never
raised: FAILED (nothing was committed, the epoch is over here) or REFUSED (not executed). The
first plan of a higher epoch empties every slot; blocks and their names stay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from quire.errors import QuireError
from quire.telemetry import Span, Tracer, Value
from quire.v1 import step_pb2 as pb
from quire_worker import batch, columns, sampler
from quire_worker.columns import Limits, PlanColumns, PlanError
from quire_worker.gate import PlanGate
from quire_worker.results import Clock, StepStats, add_row_error, fill_outputs, fill_timings
from quire_worker.slots import SlotTable
from quire_worker.team import Team
from quire_worker.transfer import Order, Transfer, read_orders

log = logging.getLogger("quire.worker")


class Model(Protocol):
    """What the runner needs of a model; see models/README.md."""

    def forward(self, input_ids: Any, positions: Any, attn: Any, kv_cache: Any) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size]; writes the tokens' KV."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """f32 [n, vocab_size]."""


class Runner:
    """All state of one rank's running requests. Used by one thread; the attributes that the
    heartbeat reads (those of the gate, started_ns, busy_ns) are plain ints."""

    def __init__(
        self,
        model: Model,
        kv_cache: Any,
        limits: Limits,
        device: torch.device,
        eos_token_ids: tuple[int, ...] = (),
        worker_epoch: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.limits = limits
        self.device = device
        self.gate = PlanGate(worker_epoch, self._begin_epoch)
        self.tracer = tracer
        self.table = SlotTable(limits, device, eos_token_ids)
        self.team = Team(torch.get_num_threads())
        self.transfer = Transfer(kv_cache.pool, limits.num_host_blocks)
        self.memory_bytes = 0  # of the device, used by this process; set by the owner
        self.started_ns = 0  # when the step in hand began, 0 = idle
        self.busy_ns = 0  # in all
        self.stats = StepStats()
        self.fault: Callable[[SlotTable, np.ndarray], None] | None = None  # see faults.py
        self._ended_ns = time.monotonic_ns()
        self._spans: dict[int, Span] = {}
        self._first_own_block: dict[int, int] = {}  # slot -> index of its first block not shared

    def execute(self, plan: pb.StepPlan, received_ns: int | None = None) -> pb.StepResult:
        """The plan's result. received_ns: monotonic time at which the plan arrived."""
        begin = time.monotonic_ns()
        answer = self.gate.check(plan)
        if answer is not None:
            return answer
        stats = self.stats = StepStats(
            queue=begin - received_ns if received_ns else 0, idle=max(begin - self._ended_ns, 0)
        )
        self.started_ns = begin
        try:
            result = self._step(plan, stats, begin)
        except PlanError as error:
            result = self._failed(plan, f"plan {plan.seq} of epoch {plan.epoch}: {error}")
            log.error("%s", result.error)
        except Exception as error:
            log.exception("step %d of epoch %d failed", plan.seq, plan.epoch)
            result = self._failed(plan, f"{type(error).__name__}: {error}"[:2000])
        self._ended_ns = time.monotonic_ns()
        self.busy_ns += self._ended_ns - begin
        self.started_ns = 0
        self.gate.done(result)
        return result

    def _begin_epoch(self) -> None:
        self.table.clear()
        self._first_own_block.clear()
        for slot in list(self._spans):
            self._end_span(slot, "cancelled")

    def _failed(self, plan: pb.StepPlan, error: str) -> pb.StepResult:
        return self.gate.answer(plan, pb.STEP_STATUS_FAILED, error)

    # -- one step --------------------------------------------------------------------------
    @torch.inference_mode()
    def _step(self, plan: pb.StepPlan, stats: StepStats, begin: int) -> pb.StepResult:
        table = self.table
        cols = columns.read_columns(plan, self.limits)
        orders = read_orders(plan, self.limits)
        result = self.gate.answer(plan, pb.STEP_STATUS_OK)
        self._retire(cols.retired_slots)
        self._copy(orders, stats, result)
        self._apply(plan, cols, result)
        if not table.in_use[cols.slots].all():
            free = int(cols.slots[~table.in_use[cols.slots]][0])
            raise PlanError(f"slots: nobody is in slot {free}.")
        rows = np.flatnonzero(~table.finished[cols.slots])
        slots, num_tokens, flags = cols.slots[rows], cols.num_tokens[rows], cols.flags[rows]
        wanted = ((flags & pb.ROW_FLAG_SAMPLE) != 0) & ~table.muted[slots]
        pools = wanted & ((flags & pb.ROW_FLAG_POOL) != 0)
        samples = wanted & ~pools
        sampling = slots[samples]
        drawn = vectors = None
        clock = Clock(self.device, begin)
        if len(slots):
            if self.fault is not None:
                self.fault(table, slots)
            self.team.gather(int(num_tokens.sum()))
            inputs = batch.build(table, slots, num_tokens, wanted)
            attn = batch.attention_metadata(table, inputs)
            clock.mark()
            hidden = self.model.forward(inputs.input_ids, inputs.positions, attn, self.kv_cache)
            if inputs.num_tokens != int(wanted.sum()):
                hidden = hidden[inputs.logits_indices]
            if pools.any():
                vectors = _unit(hidden[pools[wanted]])
                hidden = hidden[samples[wanted]]
            if len(sampling):
                logits = self.model.compute_logits(hidden)
                clock.mark()
                wants_logprobs = (flags[samples] & pb.ROW_FLAG_LOGPROBS) != 0
                drawn = sampler.sample(logits, table, sampling, wants_logprobs)
        prepare, stats.forward, stats.sample = clock.split()
        stats.prepare = prepare - stats.copy
        # Nothing below this line waits for the device or can fail half-way.
        self._commit(cols, slots, num_tokens, sampling, drawn, result)
        if vectors is not None:
            self._pool(slots[pools], vectors, result)
        self._count(stats, slots, num_tokens, sampling)
        fill_timings(result, stats)
        result.device_memory_bytes = self.memory_bytes
        return result

    def _retire(self, slots: np.ndarray) -> None:
        if len(slots):
            for slot in slots.tolist():
                self._end_span(slot)
                self._first_own_block.pop(slot, None)
            self.table.retire(slots)

    def _copy(self, orders: list[Order], stats: StepStats, result: pb.StepResult) -> None:
        """The plan's kv_ops, one after the other, before anybody takes the blocks they free."""
        if not orders:
            return
        begin = time.monotonic_ns()
        for order in orders:
            self.transfer.run(order)
            result.kv_ops_done.append(order.op_id)
        self.transfer.finish()
        stats.copy = time.monotonic_ns() - begin
        stats.num_copied = sum(len(order.dst) for order in orders)

    def _apply(self, plan: pb.StepPlan, cols: PlanColumns, result: pb.StepResult) -> None:
        """What comes between kv_ops and the rows: admissions and new blocks."""
        table = self.table
        if plan.adapter_ops:
            raise PlanError("adapter_ops: this worker has no adapters.")
        for admit in plan.admit:
            error = table.admit(admit)
            slot = admit.slot
            shared = admit.num_computed_tokens // self.limits.block_size
            self._first_own_block[slot] = shared
            # Blocks that this request will write belong to it: their old content is gone.
            self.transfer.names.forget(table.block_rows[slot, shared : table.num_blocks[slot]])
            if error is not None:
                add_row_error(result, slot, error)
            if self.tracer is not None and admit.trace.traceparent:
                context = (admit.trace.traceparent, admit.trace.tracestate)
                attributes: dict[str, Value] = {
                    "quire.request_id": admit.request_id,
                    "quire.slot": slot,
                }
                self._spans[slot] = self.tracer.span(
                    "worker request", context, attributes=attributes
                )
        table.append_blocks(cols.new_block_rows, cols.new_block_ids)
        self.transfer.names.forget(cols.new_block_ids)

    def _commit(
        self,
        cols: PlanColumns,
        slots: np.ndarray,
        num_tokens: np.ndarray,
        sampling: np.ndarray,
        drawn: sampler.Sampled | None,
        result: pb.StepResult,
    ) -> None:
        """Count the step in the table and write its output columns."""
        table = self.table
        tokens = np.zeros(0, np.int32) if drawn is None else drawn.tokens
        good = np.ones(len(sampling), bool)
        if drawn is not None and drawn.errors:
            good[list(drawn.errors)] = False
        table.commit(slots, num_tokens, sampling[good], tokens[good])
        self.transfer.names.give(cols.named_block_ids, cols.block_names)
        if len(slots) < len(cols.slots):
            self._unname_skipped(cols.slots[table.finished[cols.slots]])
        if drawn is not None:
            for row, error in drawn.errors.items():
                self._fail_row(int(sampling[row]), error, result)
        asked = cols.slots[(cols.flags & pb.ROW_FLAG_SAMPLE) != 0]
        fill_outputs(result, asked, table.finished[asked], sampling, good, drawn)

    def _pool(self, slots: np.ndarray, vectors: np.ndarray, result: pb.StepResult) -> None:
        """The vectors [num_pooled, hidden_size] of these slots; one that is no number fails."""
        good = np.isfinite(vectors).all(axis=1)
        for slot in slots[~good].tolist():
            error = QuireError("numeric_error", "the model's hidden state is not finite.")
            self._fail_row(slot, error, result)
        result.pooled = vectors[good].tobytes()

    def _fail_row(self, slot: int, error: QuireError, result: pb.StepResult) -> None:
        """The row alone failed. What it wrote is suspect, so its own blocks lose their names."""
        table = self.table
        table.fail(slot)
        own = table.block_rows[slot, self._first_own_block[slot] : table.num_blocks[slot]]
        self.transfer.names.forget(own)
        add_row_error(result, slot, error)
        log.warning(
            "slot %d failed alone: %s", slot, error.message,
            extra={"request_id": table.request_id.get(slot, "")},
        )  # fmt: skip

    def _unname_skipped(self, slots: np.ndarray) -> None:
        """Blocks that a skipped row would have filled hold no content to be named after."""
        table = self.table
        for slot in slots.tolist():
            filled = table.num_computed_tokens[slot] // self.limits.block_size
            self.transfer.names.forget(table.block_rows[slot, filled : table.num_blocks[slot]])

    def _count(
        self, stats: StepStats, slots: np.ndarray, num_tokens: np.ndarray, sampling: np.ndarray
    ) -> None:
        total, rows = int(num_tokens.sum()), len(slots)
        stats.num_rows = rows
        stats.num_sampled = len(sampling)
        stats.decode_tokens = rows if total == rows else int((num_tokens == 1).sum())
        stats.prefill_tokens = total - stats.decode_tokens

    def _end_span(self, slot: int, error: str = "") -> None:
        span = self._spans.pop(slot, None)
        if span is not None:
            outputs = self.table.num_tokens[slot] - self.table.prompt_len[slot]
            span.set(quire__prompt_tokens=int(self.table.prompt_len[slot]),
                     quire__output_tokens=int(outputs))  # fmt: skip
            span.end(error)


def _unit(hidden: torch.Tensor) -> np.ndarray:
    """Last-token pooling: f32 [n, hidden_size], each row of length 1, on the host."""
    return F.normalize(hidden.float(), dim=-1).cpu().numpy()
