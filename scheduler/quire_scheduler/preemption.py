"""Who gives way when blocks run out, and what becomes of its blocks: pure functions.

Knows counts and what things cost, in seconds; no state, no plan and no wire.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.step_cost import StepCostModel, attended
from quire_scheduler.columns import Columns, Slots
from quire_scheduler.kv import HostTier


class Victim(NamedTuple):
    slot: int
    offload: bool  # its blocks are worth a place on the host; else they are computed anew


def recompute_s(cost: StepCostModel, start: Any, num_tokens: Any) -> Any:
    """Seconds that computing `num_tokens` from position `start` on adds to steps that run anyway;
    0 while nothing is known. Numbers or arrays."""
    _, per_token, _, per_attended, _ = cost.coefficients
    chunk = per_token * num_tokens + per_attended * attended(num_tokens, start + num_tokens)
    return chunk * 1e-6


def pick_victim(
    columns: Columns, slots: Slots, cost: StepCostModel, host: HostTier | None, block_size: int
) -> Victim:
    """Of the slots [n >= 1], the one whose preemption loses least: lowest priority, then fewest
    seconds, then (where nothing is known of seconds) fewest tokens, then the latest arrival.

    What is lost is the time to compute its tokens again; or, if that is less, to copy its full
    blocks to the host and back and to compute the rest. A request whose tokens in flight complete
    it loses nothing.
    """
    done = columns.num_expected[slots] >= columns.max_total[slots]
    computed = np.where(done, 0, columns.num_computed_tokens[slots]).astype(np.int64)
    loss = recompute_s(cost, 0, computed)
    offload = np.zeros(len(slots), bool)
    if host is not None:
        # the last confirmed token's KV is not there before the next one comes
        blocks = np.minimum(columns.num_tokens[slots] - 1, computed) // block_size
        kept = blocks * block_size
        copied = 2 * host.copy_s * blocks + recompute_s(cost, kept, computed - kept)
        offload = (copied < loss) & (blocks <= host.num_blocks)
        loss = np.where(offload, copied, loss)
    order = np.lexsort((-columns.arrival[slots], computed, loss, -columns.priority[slots]))
    best = int(order[0])
    return Victim(int(slots[best]), bool(offload[best]))
