"""KVHandle: one request's hold on KV memory, and KVStats: what the manager counted.

Plain data. Only KVManager writes them; the engine reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire_scheduler.kv.blocks import BlockIds
from quire_scheduler.kv.radix import Node


@dataclass(slots=True)
class KVStats:
    """Running totals since the start."""

    queries: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    grafted_blocks: int = 0  # found by name, after a restart


@dataclass(eq=False, slots=True)
class KVHandle:
    """Comes from match_prefix, goes back by release. Identity is the object's."""

    owner: str
    node: Node | None  # lock receipt and tree cursor; None without prefix caching
    table: BlockIds  # [capacity]
    num_blocks: int
    num_published: int  # leading blocks already offered to the tree
    num_cached_tokens: int
    num_query_tokens: int  # 0 = not a query
    shared: BlockIds  # tree blocks equal to private ones in the table, held beside them
    live: bool = True
    counted: bool = False  # its query is in the stats

    @property
    def block_ids(self) -> BlockIds:
        """The block table, int32 [num_blocks]: a view, valid until the next allocation."""
        return self.table[: self.num_blocks]

    def append(self, ids: BlockIds) -> None:
        """Blocks `ids` [n] at the table's end."""
        have, want = self.num_blocks, self.num_blocks + len(ids)
        if want > len(self.table):
            table = np.empty(2 * want, np.int32)
            table[:have] = self.table[:have]
            self.table = table
        self.table[have:want] = ids
        self.num_blocks = want
