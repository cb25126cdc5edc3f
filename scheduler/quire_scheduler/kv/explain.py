"""Looking at the books: who has a block, and whether all of them agree.

Changes nothing and is slow on purpose: it recomputes what the manager keeps up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from quire_scheduler.kv.blocks import NULL_BLOCK, BlockAccountingError, BlockIds
from quire_scheduler.kv.names import NAME_BYTES
from quire_scheduler.kv.naming import PREPARED, UNTOLD
from quire_scheduler.kv.radix import NO_BLOCKS, Node

if TYPE_CHECKING:
    from quire_scheduler.kv.manager import KVManager


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is known of one block."""

    block_id: int
    state: str  # null | free | used | cached | fenced
    tier: str  # device | host
    owners: tuple[str, ...]  # requests with the block in their table
    num_holders: int  # requests and fences
    age_s: float | None  # since it entered the tree; None outside it
    hits: int
    name: bytes | None  # 16 bytes; None while not hashed yet, or never published


def explain_blocks(
    kv: KVManager, block_ids: Sequence[int], tier: str = "device"
) -> list[BlockInfo]:
    """What is known of each of them, in one pass. IndexError if there is no such block."""
    return _on_host(kv, block_ids) if tier == "host" else _on_device(kv, block_ids)


def _on_device(kv: KVManager, block_ids: Sequence[int]) -> list[BlockInfo]:
    pool = kv.pool
    wanted = np.zeros(pool.num_blocks, np.bool_)
    for block_id in block_ids:
        if not 0 <= block_id < pool.num_blocks:
            raise IndexError(f"block {block_id} does not exist: the pool has {pool.num_blocks}")
        wanted[block_id] = True
    owners: dict[int, list[str]] = {}
    for handle in kv.handles.values():
        for block_id in handle.block_ids[wanted[handle.block_ids]].tolist():
            owners.setdefault(block_id, []).append(handle.owner)
    shared: dict[int, tuple[Node, int]] = {}  # node, place in it
    for node in kv.tree.nodes():
        ids = node.ids
        for place in np.flatnonzero(wanted[ids]).tolist():
            shared[int(ids[place])] = node, place
    now = kv.clock()
    found = []
    for block_id in block_ids:
        age, hits, name = None, 0, kv.index.name_of(block_id)
        if block_id in shared:
            node, place = shared[block_id]
            name = bytes(node.names[place * NAME_BYTES : (place + 1) * NAME_BYTES]) or None
            age, hits = now - node.created, node.hits
        found.append(
            BlockInfo(
                block_id,
                _state(kv, block_id),
                "device",
                tuple(owners.get(block_id, ())),
                int(pool.refs[block_id]),
                age,
                hits,
                name,
            )
        )
    return found


def most_hit(kv: KVManager, count: int, tier: str = "device") -> list[int]:
    """Blocks of a tier that hold a prefix, by how often they were found again, most first."""
    if tier == "host":
        return kv.host.most_hit(count) if kv.host is not None else []
    nodes = sorted(kv.tree.nodes(), key=lambda node: -node.hits)
    chain = (int(block_id) for node in nodes for block_id in node.ids)
    return list(islice(chain, count))


def _state(kv: KVManager, block_id: int) -> str:
    pool = kv.pool
    holders = int(pool.refs[block_id])
    if block_id == NULL_BLOCK:
        return "null"
    if pool.is_free(block_id):
        return "free"
    if not holders:
        return "cached"
    return "fenced" if holders == int(pool.fence_refs[block_id]) else "used"


def _on_host(kv: KVManager, block_ids: Sequence[int]) -> list[BlockInfo]:
    """The same for blocks of the host tier, which no request holds."""
    found = []
    for block_id in block_ids:
        if kv.host is None:
            raise IndexError(f"host block {block_id} does not exist: there is no host tier")
        name, age, hits = kv.host.look(block_id)
        state = "free" if name is None else "cached"
        found.append(BlockInfo(block_id, state, "host", (), 0, age, hits, name))
    return found


def check_books(kv: KVManager) -> None:
    """See KVManager.check."""
    kv.pool.check()
    kv.tree.check()
    if kv.host is not None:
        kv.host.check()
    pool, nodes = kv.pool, list(kv.tree.nodes())

    in_tree = _all([node.ids for node in nodes])
    by_name = kv.index.block_ids()
    kept = np.concatenate((in_tree, by_name))
    twice = np.flatnonzero(np.bincount(kept, minlength=pool.num_blocks) > 1)
    if len(twice):
        raise BlockAccountingError(f"block {twice[0]} is in the tree or name index twice")
    wrong = np.setxor1d(kept, np.flatnonzero(pool.kept))
    if len(wrong):
        raise BlockAccountingError(f"block {wrong[0]}: pool and indexes disagree on keeping it")

    tables = kv.tables
    if not np.array_equal(np.flatnonzero(tables.live), sorted(kv.handles)):
        raise BlockAccountingError("the rows of the block tables differ from the handles")
    handles = list(kv.handles.values())
    held = _all([ids for handle in handles for ids in (handle.block_ids, handle.shared)])
    refs = np.bincount(held, minlength=pool.num_blocks) + pool.fence_refs
    wrong = np.flatnonzero(refs != pool.refs)
    if len(wrong):
        raise BlockAccountingError(
            f"block {wrong[0]} has {pool.refs[wrong[0]]} holders, {refs[wrong[0]]} are known"
        )

    locks: dict[Node, int] = {}
    for handle in handles:
        step = handle.node
        while step is not None:
            locks[step] = locks.get(step, 0) + 1
            step = step.parent
    prepared = kv.ledger.waiting(pool.kept)
    for node in nodes:
        if node.ref != locks.get(node, 0):
            raise BlockAccountingError(f"a node counts {node.ref} locks, has {locks.get(node, 0)}")
        live = pool.refs[node.ids] - pool.fence_refs[node.ids]
        if (live != node.ref).any():
            bad = node.ids[live != node.ref][0]
            raise BlockAccountingError(f"block {bad} and its node differ in holders")
        if len(node.names) > NAME_BYTES * node.num_blocks:
            raise BlockAccountingError("a node has more names than blocks")
        named = kv.ledger.named_seq[node.ids]
        lost = (named == PREPARED) & ~np.isin(node.ids, prepared)
        if lost.any() or ((named == UNTOLD).any() and node not in kv.tree.unnamed):
            raise BlockAccountingError("a block's name will never be told to the worker")
    if any(node.ref != locks.get(node, 0) for node in kv.tree.roots.values()):
        raise BlockAccountingError("a root's locks differ from the handles below it")


def _all(parts: list[BlockIds]) -> BlockIds:
    return np.concatenate(parts) if parts else NO_BLOCKS
