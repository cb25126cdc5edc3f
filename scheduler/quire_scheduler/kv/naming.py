"""Names in motion: which the worker still has to be told, and which blocks are known by name only.

Does not know requests, locks or eviction; hashing itself is in names.py, the tree in radix.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.blocks import BlockIds
from quire_scheduler.kv.names import NAME_BYTES, chain_bytes
from quire_scheduler.kv.radix import NO_BLOCKS, Node, RadixTree

UNTOLD = -1


class NameLedger:
    """Per block of the tree: the plan that writes it and the plan that tells its name.

    Sequence numbers belong to the current epoch; 0 means before it, hence certain.
    """

    def __init__(self, num_blocks: int) -> None:
        # The mutable state; entries mean something only for blocks that are in the tree.
        self.published_seq: NDArray[np.int64] = np.zeros(num_blocks, np.int64)  # [num_blocks]
        self.named_seq: NDArray[np.int64] = np.zeros(num_blocks, np.int64)  # [num_blocks] or UNTOLD

    def publish(self, ids: BlockIds, seq: int) -> None:
        """Blocks that plan `seq` writes (or wrote) entered the tree; the worker has no name yet."""
        self.published_seq[ids] = seq
        self.named_seq[ids] = UNTOLD

    def graft(self, ids: BlockIds) -> None:
        """Blocks that the worker itself named entered the tree."""
        self.published_seq[ids] = 0
        self.named_seq[ids] = 0

    def take(self, tree: RadixTree, seq: int) -> tuple[BlockIds, bytes]:
        """What plan `seq` tells the worker: ids [n], 16 * n bytes. Hashes what is not hashed yet.

        Blocks written by plan `seq` itself wait: if it fails the worker must not have named them.
        """
        id_parts: list[BlockIds] = []
        name_parts: list[bytes] = []
        for node in list(tree.unnamed):
            untold = self.named_seq[node.ids] == UNTOLD
            ready = np.flatnonzero(untold & (self.published_seq[node.ids] < seq))
            if len(ready) == np.count_nonzero(untold):
                del tree.unnamed[node]
            if not len(ready):
                continue
            names = complete_names(tree, node)
            ids = node.ids[ready]
            self.named_seq[ids] = seq
            id_parts.append(ids)
            start, end = int(ready[0]), int(ready[-1]) + 1
            if end - start == len(ready):
                name_parts.append(names[start * NAME_BYTES : end * NAME_BYTES])
            else:
                rows = np.frombuffer(names, np.uint8).reshape(-1, NAME_BYTES)
                name_parts.append(rows[ready].tobytes())
        if not id_parts:
            return NO_BLOCKS, b""
        return np.concatenate(id_parts), b"".join(name_parts)

    def new_epoch(self, tree: RadixTree, acknowledged: int) -> None:
        """The tree holds only certain blocks now: names told by lost plans are to be told again."""
        for node in tree.nodes():
            named = self.named_seq[node.ids]
            if named.max() > acknowledged or named.min() == UNTOLD:
                tree.unnamed[node] = None
        self.named_seq[self.named_seq > acknowledged] = UNTOLD
        self.named_seq[self.named_seq > 0] = 0
        self.published_seq[:] = 0


def complete_names(tree: RadixTree, node: Node) -> bytes:
    """Names of all of the node's blocks, 16 bytes each, hashed on demand from the root down."""
    path: list[Node] = []
    step: Node | None = node
    while step is not None and len(step.names) < NAME_BYTES * max(1, len(step.ids)):
        path.append(step)
        step = step.parent
    for step in reversed(path):
        assert step.parent is not None
        previous = (step.names or step.parent.names)[-NAME_BYTES:]
        data = step.key[len(step.names) // NAME_BYTES * tree.block_bytes :]
        step.names += chain_bytes(previous, data, tree.block_bytes)
    return node.names


class NameIndex:
    """Blocks a worker still holds that no prefix in the tree leads to: name -> block id."""

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}  # the mutable state

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: bytes) -> bool:
        return name in self._ids

    def add(self, name: bytes, block_id: int) -> None:
        self._ids[name] = block_id

    def pop(self, name: bytes) -> int | None:
        """The block of that name, which leaves the index; None if unknown."""
        return self._ids.pop(name, None)

    def pop_any(self, n: int) -> BlockIds:
        """Up to n blocks leave the index: int32 [<= n]."""
        count = min(n, len(self._ids))
        return np.array([self._ids.popitem()[1] for _ in range(count)], np.int32)

    def block_ids(self) -> BlockIds:
        """All blocks in the index: int32 [len(self)]."""
        return np.fromiter(self._ids.values(), np.int32, len(self._ids))

    def name_of(self, block_id: int) -> bytes | None:
        """Linear search, for explanations only."""
        return next((name for name, held in self._ids.items() if held == block_id), None)
