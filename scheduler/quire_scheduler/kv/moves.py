"""Blocks that leave the device and come back from the host: where cache and host tier meet.

Part of KVManager, which calls it; knows its parts and nothing beyond them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire_scheduler.kv.blocks import BlockAccountingError, BlockIds
from quire_scheduler.kv.handle import KVHandle
from quire_scheduler.kv.names import NAME_BYTES
from quire_scheduler.kv.naming import complete_names
from quire_scheduler.kv.radix import NO_BLOCKS, Node
from quire_scheduler.kv.recovery import names_after
from quire_scheduler.kv.tiers import HostTier

if TYPE_CHECKING:
    from quire_scheduler.kv.manager import KVManager


def evict(kv: KVManager, most: int) -> BlockIds:
    """Up to so many cached blocks leave tree or name index, those known by name only first; the
    host keeps what is worth it. The caller hands them out in the plan being built or later."""
    if len(kv.index):
        ids, names = kv.index.pop_any(most)
        if kv.host is not None:
            kv.host.offload(ids, names, 0)
        return ids
    node = kv.tree.victim()
    if node is None:
        raise BlockAccountingError(f"{kv.pool.num_cached} blocks cached, none evictable")
    left = max(0, node.num_blocks - most)
    if kv.host is not None:
        ids, names = node.ids[left:], bytes(complete_names(kv.tree, node)[left * NAME_BYTES :])
        written = kv.ledger.published_seq[ids] < kv.next_seq  # copies run before the plan's rows
        if written.all():
            kv.host.offload(ids, names, kv.tree.depth(node) + left)
    return kv.tree.cut(node, left)


def load_prefix(kv: KVManager, host: HostTier, handle: KVHandle, data: bytes, seq: int) -> bool:
    """See KVManager.load_prefix. data: token_bytes of the whole request."""
    block_bytes = kv.tree.block_bytes
    end = max(0, len(data) - 4) // block_bytes  # at least the last token is left to compute
    while host.saves(handle.num_blocks):
        first, node = handle.num_blocks, handle.node
        assert node is not None
        node, ids, complete = _load(kv, host, node, data[first * block_bytes :], end - first, seq)
        if len(ids) and complete and len(kv.index):  # after a restart the tiers hold it by turns
            node, grafted = kv.graft(node, data, first + len(ids), end)
            ids = np.concatenate((ids, grafted))
        kv.begin_with(handle.row, node, ids)
        handle.num_cached_tokens = handle.num_blocks * kv.block_size
        if not len(ids) or not complete:
            return complete
    return True


def _load(
    kv: KVManager, host: HostTier, node: Node, data: bytes, max_blocks: int, seq: int
) -> tuple[Node, BlockIds, bool]:
    """Blocks of `data` that continue `node`, as far as one plan's copies may go: (the new cursor,
    block ids [n], whether that is all there is). The caller holds them and the cursor."""
    room = host.room(loads=True)
    names = host.find(names_after(kv.tree, node, data, max_blocks), room + 1)
    complete = len(names) <= room
    names = names[:room]
    host.pin(names)
    ids = kv.allocate(len(names))
    if ids is None:
        return node, NO_BLOCKS, True
    if not names:
        return node, NO_BLOCKS, complete
    host.load(names, ids)
    kv.pool.keep(ids)
    kv.ledger.load(ids, seq)
    kv.stats.host_hit_tokens += len(ids) * kv.block_size
    data = data[: len(ids) * kv.tree.block_bytes]
    return kv.tree.insert(node, data, ids, b"".join(names)).node, ids, complete
