"""What a new epoch and a restart do to the cache: drop the doubtful, adopt the inventory, graft it.

Does not know requests or why the epoch changed; the manager has released all handles before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.blocks import NULL_BLOCK, BlockIds, BlockPool
from quire_scheduler.kv.names import NAME_BYTES, next_name
from quire_scheduler.kv.naming import NameIndex, NameLedger, complete_names
from quire_scheduler.kv.radix import NO_BLOCKS, Node, RadixTree


def drop_unacknowledged(
    tree: RadixTree, ledger: NameLedger, pool: BlockPool, acknowledged: int
) -> None:
    """Takes blocks of plans after `acknowledged`, and all that follow them, out of the tree.

    Nothing in the tree is locked. What stays is certain, and told again where the name got lost.
    """
    for node in reversed(list(tree.nodes())):  # children before parents
        doubtful = ledger.published_seq[node.ids] > acknowledged
        if not doubtful.any():
            continue
        below = [node]
        for inner in below:
            below.extend(inner.children.values())
        for inner in reversed(below[1:]):
            pool.unkeep(tree.cut(inner, 0))
        pool.unkeep(tree.cut(node, int(doubtful.argmax())))


def adopt(pool: BlockPool, index: NameIndex, ids: NDArray[np.int32], names: bytes) -> int:
    """Puts free blocks `ids` [n] under `names` (16 * n bytes) into the index; returns how many.

    Passed over: blocks in use or known already, ids out of range, ids and names that repeat.
    """
    adopted: dict[int, bytes] = {}
    for i, block_id in enumerate(ids.tolist()):
        name = names[i * NAME_BYTES : (i + 1) * NAME_BYTES]
        usable = NULL_BLOCK < block_id < pool.num_blocks and pool.is_free(block_id)
        if usable and block_id not in adopted and name not in index:
            adopted[block_id] = name
            index.add(name, block_id)
    pool.take(np.fromiter(adopted, np.int32, len(adopted)))
    return len(adopted)


def names_after(tree: RadixTree, node: Node, data: bytes, max_blocks: int) -> Iterator[bytes]:
    """Names of the blocks of `data` that follow `node`, each computed when it is asked for."""
    step = tree.block_bytes
    name = bytes(complete_names(tree, node)[-NAME_BYTES:])
    for start in range(0, max_blocks * step, step):
        name = next_name(name, data[start : start + step])
        yield name


def find_by_name(
    tree: RadixTree, index: NameIndex, node: Node, data: bytes, max_blocks: int
) -> tuple[BlockIds, bytes]:
    """Blocks that continue `node` with `data` leave the index: ids [n <= max_blocks], names.

    Names are computed one by one, so a miss costs one hash.
    """
    found: list[int] = []
    names: list[bytes] = []
    for name in names_after(tree, node, data, max_blocks):
        block_id = index.pop(name)
        if block_id is None:
            break
        found.append(block_id)
        names.append(name)
    return (np.array(found, np.int32), b"".join(names)) if found else (NO_BLOCKS, b"")
