"""KVHandle: one request's hold on KV memory, and KVStats: what the manager counted.

Plain data. Only KVManager writes them; the engine reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire_scheduler.kv.blocks import BlockIds
from quire_scheduler.kv.radix import NO_BLOCKS, Node
from quire_scheduler.kv.tables import BlockTables


@dataclass(slots=True)
class KVStats:
    """Running totals since the start."""

    queries: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    grafted_blocks: int = 0  # found by name, after a restart
    host_hit_tokens: int = 0  # of hit tokens, those that were loaded from the host


@dataclass(eq=False, slots=True)
class KVHandle:
    """Comes from match_prefix, goes back by release. Identity is the object's."""

    owner: str
    tables: BlockTables
    row: int  # of the tables; nobody else's while the handle lives
    num_cached_tokens: int
    num_query_tokens: int  # 0 = not a query
    shared: BlockIds  # tree blocks equal to private ones in the table, held beside them
    live: bool = True
    counted: bool = False  # its query is in the stats

    @property
    def node(self) -> Node | None:
        """Lock receipt and tree cursor; None without prefix caching."""
        return self.tables.nodes[self.row] if self.live else None

    @property
    def block_ids(self) -> BlockIds:
        """The block table, int32 [num_blocks]: a view, valid until the release."""
        return self.tables.of(self.row) if self.live else NO_BLOCKS

    @property
    def num_blocks(self) -> int:
        return int(self.tables.num_blocks[self.row]) if self.live else 0

    @property
    def num_published(self) -> int:
        """Leading blocks already offered to the tree."""
        return int(self.tables.num_published[self.row]) if self.live else 0
