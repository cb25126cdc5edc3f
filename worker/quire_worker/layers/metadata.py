"""What attention is told about one step's batch.

Knows slots and lengths, no requests. Made anew for each step by the runner, read by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """All tensors on the model's device; they must not change while this object lives (a captured
    graph's may).
    """

    block_table: torch.Tensor  # int32 [max_slots, max_blocks], row = slot id
    slots: torch.Tensor  # int32 [num_reqs]
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    seq_lens: torch.Tensor  # int32 [num_reqs], KV length after this step
    slot_mapping: (
        torch.Tensor
    )  # int64 [num_tokens], block_id * block_size + offset; -1 = do not write
    max_query_len: int = 0  # upper bound, host side; 0 = unknown
    max_seq_len: int = 0  # upper bound, host side; 0 = unknown
    fixed_tiles: bool = False  # GPU: bits independent of the batch, at a price
    step_plan: Any = field(
        default=None, repr=False
    )  # CPU: index tensors shared by the layers of this step
