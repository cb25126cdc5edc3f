"""One simulated step: a plan on slots and memory, its tokens and its time.

Every rule that a plan can break raises a Violation (or a PlanError of the columns), and the epoch
is over. Knows neither epochs nor the order of plans.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from quire.latency_table import LatencyTable
from quire.step_cost import StepSize
from quire.v1 import step_pb2 as pb
from quire_worker.columns import Limits, PlanColumns, block_names, ids, read_columns
from quire_worker.simulated import tokens as hashing
from quire_worker.simulated.memory import SimulatedMemory, Violation
from quire_worker.simulated.slots import Slots
from quire_worker.simulated.times import StepTimes

_U32 = (1 << 32) - 1


class Steps:
    """`columns` and `memory` are all that a simulated device holds."""

    def __init__(self, table: LatencyTable, seed: int) -> None:
        """seed: of the drawing of step times."""
        self.table = table
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
        self.check_reads = True
        self._unread: dict[int, int] = {}  # slot without a row so far -> tokens computed for it

    def begin_epoch(self) -> None:
        """Nobody is in a slot; named blocks stay."""
        self.columns.clear()
        self._unread.clear()
        self.memory.forget_slots()

    def run(
        self, plan: pb.StepPlan, result: pb.StepResult, row_trouble: Callable[[int], str]
    ) -> float:
        """Fill the result in; the seconds that the step takes. row_trouble: the error with which a
        newly admitted slot is to fail alone, '' = none. Raises PlanError."""
        cols = read_columns(plan, self.limits)
        for slot in cols.retired_slots.tolist():
            blocks = self.columns.blocks(slot)
            self.columns.retire(slot)
            self._unread.pop(slot, None)
            self.memory.release(slot, blocks)
        copies = sum(self._kv_op(op, plan.seq) for op in plan.kv_ops)
        result.kv_ops_done.extend(op.op_id for op in plan.kv_ops)
        newcomers = self._admit(plan, cols)
        errors = {s: name for s, _ in newcomers if (name := row_trouble(s))}
        self.columns.finished[list(errors)] = True
        live, size = self._compute(cols)
        self._unread.update(newcomers)
        for slot in cols.slots.tolist() if self._unread else ():
            computed = self._unread.pop(slot, 0)
            if computed and self.check_reads and not self.columns.finished[slot]:
                self._check_shared(slot, computed // self.limits.block_size)
        names = cols.block_names.tobytes()
        for i, block in enumerate(cols.named_block_ids.tolist()):
            if self.memory.filled[block] == 0 and self._was_skipped(block):
                continue  # its row did not run: nothing to name
            self.memory.name(block, names[16 * i : 16 * i + 16])
        self._sample(cols, live, errors, result)
        result.timings.copy_micros = min(round(copies * 1e6), _U32)
        seconds = self.times.draw(size) if len(cols.slots) else 0.0
        result.timings.forward_micros = min(round(seconds * 1e6), _U32)
        return copies + seconds

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
        if len(source) != len(target) or len(names) != len(source):
            raise Violation(f"order {op.op_id} has columns of different lengths")
        (memory.offload if out else memory.load)(source, target, names)
        return len(source) * self.table.copy_micros * 1e-6

    def _admit(self, plan: pb.StepPlan, cols: PlanColumns) -> list[tuple[int, int]]:
        """Newcomers and new blocks: (slot, tokens computed already) of each newcomer. Blocks change
        hands before any are shared: a block may be one row's to write and another's to read."""
        columns, memory, size = self.columns, self.memory, self.limits.block_size
        newcomers = [(admit.slot, columns.admit(admit)) for admit in plan.admit]
        own = [columns.blocks(slot)[-(-computed // size) :] for slot, computed in newcomers]
        takers = [np.full(len(b), s, np.int32) for (s, _), b in zip(newcomers, own, strict=True)]
        columns.append_blocks(cols.new_block_rows, cols.new_block_ids)
        memory.take(
            np.concatenate((*own, cols.new_block_ids)),
            np.concatenate((*takers, cols.new_block_rows)),
        )
        for slot, computed in newcomers:
            full, rest = divmod(computed, size)
            memory.share(columns.blocks(slot)[:full])
            if rest:  # it goes on inside a block that it had before
                state = columns.by_slot[slot].states[computed - 1]
                memory.resume(slot, int(columns.blocks(slot)[full]), rest, state)
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
