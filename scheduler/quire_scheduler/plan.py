"""Plan: one step, decided, and its wire form.

Knows no policy, no state and no clock: schedule.py makes plans, results.py answers them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.step_cost import StepSize
from quire.v1 import step_pb2
from quire.wire import pack_i32
from quire_scheduler.columns import I32, Slots
from quire_scheduler.kv import Order
from quire_scheduler.request import Request

NONE: I32 = np.zeros(0, np.int32)
_WIRE_I32 = np.dtype("<i4")
NO_SLOTS: Slots = np.zeros(0, np.intp)


@dataclass(slots=True, eq=False)
class Plan:
    """One step, decided. `slots` and what stands beside it are [num_rows] in execution order."""

    epoch: int
    seq: int
    slots: Slots = field(default_factory=lambda: NO_SLOTS)
    num_tokens: I32 = field(default_factory=lambda: NONE)
    flags: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    new_block_rows: Slots = field(default_factory=lambda: NO_SLOTS)
    new_block_ids: I32 = field(default_factory=lambda: NONE)
    named_block_ids: I32 = field(default_factory=lambda: NONE)
    block_names: bytes = b""
    retired_slots: I32 = field(default_factory=lambda: NONE)
    admitted: list[tuple[Request, int]] = field(default_factory=list)  # first computed position
    total_tokens: int = 0
    num_sampled: int = 0  # rows that yield something
    num_context_tokens: int = 0  # KV tokens the step reads
    num_attended_tokens: int = 0  # sum over its tokens of the positions each attends to
    copies: list[Order] = field(default_factory=list)  # between the tiers, before the rows
    copies_s: float = 0.0  # what they are expected to take
    # filled in by the engine
    sent_at: float = 0.0
    begins_at: float = 0.0  # when the worker is expected to begin it
    predicted_s: float = 0.0
    ranks: set[int] = field(default_factory=set)  # that have not answered
    result: step_pb2.StepResult | None = None

    @property
    def sampled(self) -> Slots:
        """Slots of the rows that sample [num_sampled]."""
        if self.num_sampled == len(self.slots):
            return self.slots
        slots: Slots = self.slots[(self.flags & step_pb2.ROW_FLAG_SAMPLE) != 0]
        return slots

    @property
    def size(self) -> StepSize:
        return StepSize(
            self.total_tokens,
            self.num_context_tokens,
            self.num_attended_tokens,
            self.num_sampled,
        )

    @property
    def num_copied_blocks(self) -> int:
        return sum(len(order) for order in self.copies)

    def frame(self, now: float, deadline_ms: int = 0) -> step_pb2.SchedulerFrame:
        """The wire form. now: the engine's clock, seconds."""
        frame = step_pb2.SchedulerFrame()
        message = frame.plan
        message.epoch, message.seq, message.deadline_ms = self.epoch, self.seq, deadline_ms
        message.slots, message.num_tokens = _column(self.slots), _column(self.num_tokens)
        message.flags = self.flags.tobytes()
        message.new_block_rows = _column(self.new_block_rows)
        message.new_block_ids = _column(self.new_block_ids)
        message.named_block_ids = _column(self.named_block_ids)
        message.block_names = self.block_names
        message.retired_slots = _column(self.retired_slots)
        for request, first in self.admitted:
            assert request.columns is not None
            kv = request.columns.kv[request.slot]
            assert kv is not None
            message.admit.append(request.admit(request.slot, first, kv.block_ids, now))
        if self.admitted and any(admit.HasField("trace") for admit in message.admit):
            message.traces.extend(admit.trace for admit in message.admit)
        message.kv_ops.extend(kv_op(order) for order in self.copies)
        return frame


def _column(values: NDArray[np.signedinteger]) -> bytes:
    return values.astype(_WIRE_I32).tobytes() if len(values) else b""


def kv_op(order: Order) -> step_pb2.KvOp:
    """The wire form of one order."""
    load, offload = step_pb2.KV_OP_KIND_LOAD, step_pb2.KV_OP_KIND_OFFLOAD
    return step_pb2.KvOp(
        op_id=order.op_id,
        kind=load if order.is_load else offload,
        src_block_ids=pack_i32(order.src),
        dst_block_ids=pack_i32(order.dst),
        block_names=b"".join(order.names),
    )
