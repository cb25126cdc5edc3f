"""InputBatch: one step's tensors, built from plan columns and the slot table.

Knows no model and no sampling: where each token stands, which slot it belongs to, and where its
keys and values go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quire_worker.columns import PlanError
from quire_worker.layers.metadata import AttentionMetadata
from quire_worker.slots import SlotTable


@dataclass(frozen=True, slots=True)
class InputBatch:
    """The rows of one step, flat, requests one after another. Tensors lie on the model's device."""

    input_ids: torch.Tensor  # i32 [num_tokens]
    positions: torch.Tensor  # i32 [num_tokens]
    query_start_loc: torch.Tensor  # i32 [num_reqs + 1]
    seq_lens: torch.Tensor  # i32 [num_reqs], KV length after this step
    slot_mapping: torch.Tensor  # i64 [num_tokens], block id * block size + offset
    slots: torch.Tensor  # i32 [num_reqs]
    logits_indices: torch.Tensor  # i64 [num_samples], the tokens whose logits are wanted
    max_query_len: int
    max_seq_len: int
    num_context_tokens: int  # sum of seq_lens

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_reqs(self) -> int:
        return len(self.slots)


def build(
    table: SlotTable, slots: np.ndarray, num_tokens: np.ndarray, samples: np.ndarray
) -> InputBatch:
    """slots i32 [num_reqs], num_tokens i32 [num_reqs] to compute in each from where it stands,
    samples bool [num_reqs]: the row's last token yields logits.

    Raises PlanError for a row beyond its tokens or its blocks, and for one that would sample
    before its last token.
    """
    block_size = table.limits.block_size
    computed = table.num_computed_tokens[slots]
    seq_lens = computed + num_tokens
    known = table.num_tokens[slots]
    _check_rows(table, slots, seq_lens, known, samples)
    ends = np.cumsum(num_tokens, dtype=np.int32)
    total = int(ends[-1])
    if total == len(slots):  # one token a row: a row is a token
        token_slots, positions = slots, computed
    else:
        token_slots = np.repeat(slots, num_tokens)
        positions = np.arange(total, dtype=np.int32) + np.repeat(seq_lens - ends, num_tokens)
    input_ids = table.token_ids[token_slots, positions]
    block, offset = np.divmod(positions, block_size)
    slot_mapping = table.block_rows[token_slots, block].astype(np.int64)
    slot_mapping *= block_size
    slot_mapping += offset
    query_start_loc = np.empty(len(slots) + 1, np.int32)
    query_start_loc[0] = 0
    query_start_loc[1:] = ends
    logits_indices = ends[samples].astype(np.int64)
    logits_indices -= 1
    narrow = (input_ids, positions, query_start_loc, seq_lens, slots)
    ids, pos, start, lens, rows = _to_device(narrow, table.device)
    mapping, indices = _to_device((slot_mapping, logits_indices), table.device)
    return InputBatch(
        ids, pos, start, lens, mapping, rows, indices,
        max_query_len=int(num_tokens.max()),
        max_seq_len=int(seq_lens.max()),
        num_context_tokens=int(seq_lens.sum()),
    )  # fmt: skip


def attention_metadata(table: SlotTable, inputs: InputBatch) -> AttentionMetadata:
    """What the model's attention is told; brings the device's block table up to date."""
    table.flush_blocks()
    return AttentionMetadata(
        block_table=table.block_table,
        slots=inputs.slots,
        query_start_loc=inputs.query_start_loc,
        seq_lens=inputs.seq_lens,
        slot_mapping=inputs.slot_mapping,
        max_query_len=inputs.max_query_len,
        max_seq_len=inputs.max_seq_len,
    )


def _check_rows(
    table: SlotTable,
    slots: np.ndarray,
    seq_lens: np.ndarray,
    known: np.ndarray,
    samples: np.ndarray,
) -> None:
    room = np.minimum(table.num_blocks[slots] * table.limits.block_size, known)
    bad = (seq_lens > room) | (samples & (seq_lens != known))
    if not bad.any():
        return
    row = int(bad.argmax())
    slot, end, have = int(slots[row]), int(seq_lens[row]), int(known[row])
    if end > have:
        raise PlanError(f"num_tokens: slot {slot} would reach token {end}, but has {have} tokens.")
    if end > room[row]:
        raise PlanError(
            f"num_tokens: slot {slot} would reach token {end}, but its "
            f"{int(table.num_blocks[slot])} blocks hold {int(room[row])}."
        )
    raise PlanError(f"flags: slot {slot} would sample after token {end} of {have}.")


def _to_device(arrays: tuple[np.ndarray, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors of arrays of one dtype; to a GPU they travel in one copy."""
    if device.type == "cpu":
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    packed = torch.from_numpy(np.concatenate(arrays)).pin_memory().to(device, non_blocking=True)
    return packed.split([len(a) for a in arrays])
