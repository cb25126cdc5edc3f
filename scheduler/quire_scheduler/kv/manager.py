"""KVManager: the engine's one door to KV memory (match, allocate, publish, release, recover).

Knows blocks, prefixes and names; not budgets, priorities, slots, sockets or tensors. README.md here
has the rules for callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv import eviction, moves
from quire_scheduler.kv.blocks import BlockIds, BlockPool
from quire_scheduler.kv.explain import BlockInfo, check_books, explain_blocks
from quire_scheduler.kv.handle import KVHandle, KVStats
from quire_scheduler.kv.names import (
    NAME_BYTES,
    ModelIdentity,
    Namespace,
    next_name,
    root_of,
    token_bytes,
)
from quire_scheduler.kv.naming import NameIndex, NameLedger
from quire_scheduler.kv.radix import NO_BLOCKS, Node, RadixTree
from quire_scheduler.kv.recovery import adopt, drop_unacknowledged, find_by_name
from quire_scheduler.kv.tables import BlockTables, Rows
from quire_scheduler.kv.tiers import HostTier


class KVManager:
    """See README.md. Single-threaded; every method returns without waiting."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        identity: ModelIdentity,
        *,
        enable_prefix_caching: bool = True,
        eviction_policy: str = "lru",
        clock: Callable[[], float] = time.monotonic,
        max_requests: int = 1024,
        max_blocks_per_request: int = 0,
    ) -> None:
        """At most `max_requests` handles are live at once; none needs more than
        `max_blocks_per_request` blocks (0 = all there are)."""
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}: it must be at least 1")
        self.block_size = block_size
        self.identity = identity
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = KVStats()
        self.clock = clock
        self.host: HostTier | None = None  # the owner sets it when the workers have one
        self._policy = eviction.policy(eviction_policy)
        self._max_requests = max_requests
        self._max_blocks = max_blocks_per_request or num_blocks
        self._start(num_blocks)

    def _start(self, num_blocks: int) -> None:
        # The mutable state. Each part guards its own; only this class lets them change together.
        self.pool = BlockPool(num_blocks)
        self.tree = RadixTree(4 * self.block_size, self._policy, self.clock, self._root_name)
        self.ledger = NameLedger(num_blocks)
        self.index = NameIndex()
        self.tables = BlockTables(self._max_requests, self._max_blocks)
        self.handles: dict[int, KVHandle] = {}  # live ones by row of the tables
        self.acknowledged = 0  # highest plan of this epoch with a result
        self.next_seq = 1  # the plan being built

    # -- a request comes in

    def match_prefix(
        self,
        tokens: NDArray[np.int32],
        namespace: Namespace,
        *,
        owner: str = "",
        row: int | None = None,
        use_cache: bool = True,
    ) -> tuple[int, KVHandle]:
        """Locks the longest cached prefix of `tokens` [num_tokens]: (num_cached_tokens, handle).

        At least the last token is left to compute. use_cache=False hits nothing but may publish.
        `row` of the block tables is the caller's choice (its slot), by default any free one.
        """
        row = self.tables.open(row)
        node: Node | None = None
        ids = NO_BLOCKS
        if self.enable_prefix_caching:
            max_blocks = max(0, len(tokens) - 1) // self.block_size if use_cache else 0
            data = token_bytes(tokens)
            match = self.tree.match(namespace, data, max_blocks)
            node = self.tree.lock(match)
            ids = match.block_ids
            self.pool.retain(ids)
            if len(self.index) and len(ids) < max_blocks:
                node, grafted = self.graft(node, data, len(ids), max_blocks)
                ids = np.concatenate((ids, grafted))
        num_cached_tokens = len(ids) * self.block_size
        self.begin_with(row, node, ids)
        handle = KVHandle(
            owner,
            self.tables,
            row,
            num_cached_tokens=num_cached_tokens,
            num_query_tokens=len(tokens) if use_cache and self.enable_prefix_caching else 0,
            shared=NO_BLOCKS,
        )
        self.handles[row] = handle
        return num_cached_tokens, handle

    def load_prefix(self, handle: KVHandle, tokens: NDArray[np.int32], seq: int) -> bool:
        """Goes on where match_prefix ended, with what the host holds: plan `seq` copies it in.

        False: there is more, but not within what the copies of one plan may take. Release the
        handle then; what was loaded stays cached, and the next plan goes on from there.
        """
        self._require_live(handle)
        if self.host is None or handle.node is None:
            return True
        return moves.load_prefix(self, self.host, handle, token_bytes(tokens), seq)

    def peek_prefix(self, tokens: NDArray[np.int32], namespace: Namespace) -> int:
        """Tokens the tree would serve now (not those known by name only); touches nothing."""
        if not self.enable_prefix_caching:
            return 0
        max_blocks = max(0, len(tokens) - 1) // self.block_size
        match = self.tree.match(namespace, token_bytes(tokens), max_blocks)
        return len(match.block_ids) * self.block_size

    # -- room

    def allocate_for(self, handle: KVHandle, num_blocks: int) -> BlockIds | None:
        """Appends num_blocks blocks to the handle's table and returns them; evicts as needed.

        None if free and evictable blocks do not suffice; then nothing has changed.
        """
        self._require_live(handle)
        ids = self.allocate(num_blocks)
        if ids is not None:
            self._count(handle)
            self.tables.extend(handle.row, ids)
        return ids

    def allocate_many(self, rows: Rows, counts: NDArray[np.int32] | None = None) -> BlockIds | None:
        """allocate_for over distinct rows [n] of the tables with counts [n >= 1] (None = a block
        each), all or nothing: int32 [sum(counts)], in order. For requests that run: it counts no
        query."""
        if np.count_nonzero(self.tables.live[rows]) < len(rows):
            raise ValueError("a row of the block tables has no live handle: match the request anew")
        ids = self.allocate(len(rows) if counts is None else int(counts.sum()))
        if ids is not None:
            self.tables.append(rows, counts, ids)
        return ids

    @property
    def num_allocatable(self) -> int:
        return self.pool.num_free + self.pool.num_cached

    # -- content

    def publish(self, handle: KVHandle, tokens: NDArray[np.int32], seq: int) -> int:
        """Offers the full blocks of `tokens` [num_known] to the tree, as written by plan `seq`.

        Returns how many of the request's blocks entered. README.md says which tokens are known.
        """
        self._require_live(handle)
        first, last = handle.num_published, len(tokens) // self.block_size
        if last <= first:
            return 0
        if last > handle.num_blocks:
            raise ValueError(
                f"{len(tokens)} tokens fill {last} blocks but {handle.owner or 'the request'} "
                f"has {handle.num_blocks}: allocate before publishing"
            )
        self._count(handle)
        self.tables.num_published[handle.row] = last
        node = handle.node
        if node is None:
            return 0
        ids = handle.block_ids[first:last]
        data = token_bytes(tokens[first * self.block_size : last * self.block_size])
        node, shared, displaced = self.tree.insert(node, data, ids)
        self.tables.nodes[handle.row] = node
        entered = ids[len(shared) :]
        self.pool.keep(entered)
        self.ledger.publish(entered, seq)
        if len(shared):
            self.pool.retain(shared)
            handle.shared = np.concatenate((handle.shared, shared))
        if len(displaced):
            self.pool.unkeep(displaced)
        return len(entered)

    def publish_many(
        self, rows: Rows, num_full: NDArray[np.int32], tokens: NDArray[np.int32], seq: int
    ) -> None:
        """publish() for `rows` [n] of the tables, each beyond what it published before: the first
        num_full [n] blocks of its row of `tokens` [max_requests, blocks, block_size].

        Hashes the names too, of these and of all that is published: it is deferred work.
        """
        self.prepare_names()
        if not len(rows):
            return
        tables = self.tables
        first = tables.num_published[rows]
        slow = np.arange(len(rows))
        if self.enable_prefix_caching and not np.count_nonzero(num_full - first != 1):
            nodes = [tables.nodes[row] for row in rows.tolist()]
            ids = tables.ids[rows, first]
            data = tokens[rows, first].tobytes()
            names, others = self.tree.grow(cast(list[Node], nodes), data, ids.tobytes(), next_name)
            slow = np.array(others, np.intp)
            entered = ids.astype(np.intp)
            if others:
                entered = np.delete(entered, slow)
                tables.num_published[np.delete(rows, slow)] += 1
            else:
                tables.num_published[rows] = num_full
            self.pool.keep(entered)
            self.ledger.publish(entered, seq)
            self.ledger.add(entered, b"".join(names))
        for i in slow.tolist():
            row = int(rows[i])
            self.publish(self.handles[row], tokens[row, : num_full[i]].reshape(-1), seq)
        if len(slow):
            self.prepare_names()

    def prepare_names(self) -> None:
        """Hashes the names of blocks published so far, for the next take_named: deferred work."""
        self.ledger.prepare(self.tree)

    def acknowledge(self, seq: int) -> None:
        """Plan `seq` was executed: what it wrote is certain, fences up to it are passed."""
        self.acknowledged = max(self.acknowledged, seq)
        self.pool.pass_fence(seq)

    def take_named(self, seq: int) -> tuple[BlockIds, bytes]:
        """named_block_ids [n] and block_names (16 * n bytes) for plan `seq`, of what is prepared.

        Call it after the plan's last allocation: the worker applies names after new blocks.
        """
        if seq <= self.acknowledged:
            raise ValueError(f"plan {seq} was answered already: names go with a plan to come")
        self.next_seq = seq + 1
        return self.ledger.take(seq, self.pool.kept)

    # -- the way out

    def release(self, handle: KVHandle, *, fence_seq: int = 0) -> None:
        """Gives everything back: blocks in the tree stay cached, the others become free.

        With fence_seq they come back at acknowledge(fence_seq). A dead handle is left alone.
        """
        if not handle.live:
            return
        if handle.node is not None:
            self.tree.unlock(handle.node)
        for ids in (handle.block_ids, handle.shared):
            if fence_seq > self.acknowledged:
                self.pool.fence(ids, fence_seq)
            else:
                self.pool.release(ids)
        del self.handles[handle.row]
        self.tables.close(handle.row)
        handle.shared, handle.live = NO_BLOCKS, False

    # -- recovery

    def next_epoch(self) -> None:
        """New epoch, same worker, every plan answered: handles and blocks stay as they are."""
        self.ledger.new_epoch(self.tree, self.acknowledged)
        if self.host is not None:
            self.host.next_epoch()
        self.pool.refence(1)
        self.acknowledged, self.next_seq = 0, 1

    def reset_unacknowledged(self) -> None:
        """New epoch, same worker: every handle dies, blocks of unanswered plans are dropped.

        Fences now wait for plan 1 of the new epoch, before which a worker drains what they guard.
        """
        for handle in list(self.handles.values()):
            self.release(handle)
        drop_unacknowledged(self.tree, self.ledger, self.pool, self.acknowledged)
        if self.host is not None:
            self.host.drop_unacknowledged(self.acknowledged)
        self.next_epoch()

    def reset_all(self) -> None:
        """The worker's memory is gone: every handle dies, every block is free. Stats go on."""
        for handle in list(self.handles.values()):
            self.release(handle)
        if self.host is not None:
            self.host.reset()
        self._start(self.pool.num_blocks)

    def adopt_inventory(self, ids: NDArray[np.int32], names: bytes) -> int:
        """Blocks `ids` [n] that the worker holds under `names` (16 * n bytes), from its Hello.

        Returns how many were taken in; those in use or known here are passed over.
        """
        if len(names) != NAME_BYTES * len(ids):
            raise ValueError(f"{len(ids)} blocks come with {len(names)} bytes of names: 16 each")
        if not self.enable_prefix_caching:
            return 0
        return adopt(self.pool, self.index, ids, names)

    # -- looking

    @property
    def num_usable(self) -> int:
        return self.pool.num_usable

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_cached(self) -> int:
        return self.pool.num_cached

    @property
    def num_fenced(self) -> int:
        return self.pool.num_fenced

    @property
    def num_used(self) -> int:
        return self.pool.num_used

    @property
    def usage(self) -> float:
        return self.pool.num_used / self.pool.num_usable

    def explain(self, block_id: int, tier: str = "device") -> BlockInfo:
        """Who has a block of a tier, since when. A search: for people, not for the loop."""
        return explain_blocks(self, [block_id], tier)[0]

    def check(self) -> None:
        """Raises BlockAccountingError unless pool, tree, handles and index agree. When idle."""
        check_books(self)

    # -- inside; graft, begin_with and allocate also for the other modules of this package

    def _root_name(self, namespace: Hashable) -> bytes:
        return root_of(self.identity, cast(Namespace, namespace), self.block_size)

    def _require_live(self, handle: KVHandle) -> None:
        if not handle.live:
            raise ValueError(f"the KV handle of {handle.owner!r} is dead: match the request anew")

    def _count(self, handle: KVHandle) -> None:
        if not handle.counted:
            handle.counted = True
            if handle.num_query_tokens:
                self.stats.queries += 1
                self.stats.query_tokens += handle.num_query_tokens
                self.stats.hit_tokens += handle.num_cached_tokens

    def begin_with(self, row: int, node: Node | None, ids: BlockIds) -> None:
        """Cached blocks `ids` [n] stand at the beginning of a row, up to the cursor `node`."""
        self.tables.extend(row, ids)
        self.tables.num_published[row] = self.tables.num_blocks[row]
        self.tables.nodes[row] = node

    def allocate(self, n: int) -> BlockIds | None:
        """Blocks [n] with one holder each, evicting as needed; None if they do not suffice."""
        pool = self.pool
        if n > pool.num_free:
            if n > pool.num_free + pool.num_cached:
                return None
            while pool.num_free < n:
                short, before = n - pool.num_free, pool.num_free
                pool.unkeep(moves.evict(self, short))  # fenced ones: not free yet, hence the loop
                self.stats.evicted_blocks += pool.num_free - before
        return pool.allocate(n)

    def graft(self, node: Node, data: bytes, first: int, end: int) -> tuple[Node, BlockIds]:
        """Goes on matching by name from block `first`, up to block `end`; locks what it finds."""
        data = data[first * self.tree.block_bytes :]
        ids, names = find_by_name(self.tree, self.index, node, data, end - first)
        if len(ids):
            self.pool.retain(ids)
            self.ledger.graft(ids)
            data = data[: len(ids) * self.tree.block_bytes]
            node = self.tree.insert(node, data, ids, names).node
            self.stats.grafted_blocks += len(ids)
        return node, ids
