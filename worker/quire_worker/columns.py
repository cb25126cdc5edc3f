"""The columns of a StepPlan as checked numpy arrays, and the limits they are checked against.

Knows no slot's state and no tensors: only what can be said about a plan by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.v1 import step_pb2 as pb
from quire.wire import NAME_BYTES

KNOWN_FLAGS = pb.ROW_FLAG_SAMPLE | pb.ROW_FLAG_LOGPROBS | pb.ROW_FLAG_POOL


class PlanError(ValueError):
    """A plan that can't be right; the message names the column and the value."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one worker: what every number in a plan must lie below."""

    max_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    num_host_blocks: int = 0

    @property
    def max_blocks_per_slot(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """Arrays over the plan's bytes (no copies). Every id is in range; no slot has two rows."""

    slots: np.ndarray  # i32 [num_rows]
    num_tokens: np.ndarray  # i32 [num_rows], each at least 1
    flags: np.ndarray  # u8 [num_rows]
    new_block_rows: np.ndarray  # i32 [num_new_blocks], slots
    new_block_ids: np.ndarray  # i32 [num_new_blocks]
    named_block_ids: np.ndarray  # i32 [num_named]
    block_names: np.ndarray  # u8 [num_named, 16]
    retired_slots: np.ndarray  # i32 [num_retired]


def read_columns(plan: pb.StepPlan, limits: Limits) -> PlanColumns:
    """Raises PlanError for a column of wrong length or a number out of range."""
    slots = ids(plan.slots, limits.max_slots, "slots")
    num_tokens = ids(plan.num_tokens, limits.max_model_len + 1, "num_tokens")
    flags = np.frombuffer(plan.flags, np.uint8)
    same_length("num_tokens", num_tokens, "slots", slots)
    same_length("flags", flags, "slots", slots)
    if len(slots):
        if not num_tokens.all():
            raise PlanError("num_tokens: a row has 0 tokens; every row computes at least 1.")
        if len(slots) > 1 and len(set(slots.tolist())) < len(slots):
            raise PlanError("slots: a slot has two rows in one plan.")
        if int(np.bitwise_or.reduce(flags)) & ~KNOWN_FLAGS:
            raise PlanError(f"flags: this worker knows the bits {KNOWN_FLAGS} only.")
    new_rows = ids(plan.new_block_rows, limits.max_slots, "new_block_rows")
    new_ids = ids(plan.new_block_ids, limits.num_blocks, "new_block_ids")
    same_length("new_block_ids", new_ids, "new_block_rows", new_rows)
    named = ids(plan.named_block_ids, limits.num_blocks, "named_block_ids")
    names = block_names(plan.block_names, "block_names")
    same_length("block_names", names, "named_block_ids", named)
    if plan.draft_counts or plan.new_block_pools or plan.mask_frame or plan.micro_batch:
        raise PlanError("a field reserved for later versions is set; this worker can't follow it.")
    retired = ids(plan.retired_slots, limits.max_slots, "retired_slots")
    return PlanColumns(slots, num_tokens, flags, new_rows, new_ids, named, names, retired)


def ids(data: bytes, high: int, name: str) -> np.ndarray:
    """An i32 column of numbers in [0, high). Raises PlanError."""
    if len(data) % 4:
        raise PlanError(f"{name}: {len(data)} bytes are no column of int32.")
    column = np.frombuffer(data, "<i4")
    # As unsigned, a negative number is larger than any bound: one pass checks both ends.
    if len(column) and int(column.view("<u4").max()) >= high:
        bad = int(column[column.view("<u4") >= high][0])
        raise PlanError(f"{name}: {bad} is not between 0 and {high - 1}.")
    return column


def block_names(data: bytes, name: str) -> np.ndarray:
    """u8 [n, 16]. Raises PlanError."""
    if len(data) % NAME_BYTES:
        raise PlanError(f"{name}: {len(data)} bytes are no column of {NAME_BYTES}-byte names.")
    return np.frombuffer(data, np.uint8).reshape(-1, NAME_BYTES)


def same_length(name: str, column: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if len(column) != len(other):
        raise PlanError(f"{name} has {len(column)} entries, {other_name} has {len(other)}.")
