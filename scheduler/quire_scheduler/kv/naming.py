"""Names in motion: which the worker still has to be told, and which blocks are known by name only.

Does not know requests, locks or eviction; hashing itself is in names.py, the tree in radix.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.blocks import BlockIds
from quire_scheduler.kv.names import NAME_BYTES, chain_bytes
from quire_scheduler.kv.radix import NO_BLOCKS, Node, RadixTree

UNTOLD = -1
PREPARED = -2  # untold, and its name is hashed already


class NameLedger:
    """Per block of the tree: the plan that writes it and the plan that tells its name.

    Sequence numbers belong to the current epoch; 0 means before it, hence certain. Names are
    hashed by prepare() while the worker computes; take() hands out what is ready.
    """

    def __init__(self, num_blocks: int) -> None:
        # The mutable state; entries mean something only for blocks that are in the tree.
        self.published_seq: NDArray[np.int64] = np.zeros(num_blocks, np.int64)  # [num_blocks]
        self.named_seq: NDArray[np.int64] = np.zeros(num_blocks, np.int64)  # or UNTOLD, PREPARED
        # Which publication of the block this is: a name goes with one of them. [num_blocks]
        self.serial: NDArray[np.int64] = np.zeros(num_blocks, np.int64)
        self._last_serial = 0
        self._prepared: list[Prepared] = []

    def publish(self, ids: BlockIds | NDArray[np.intp], seq: int) -> None:
        """Blocks that plan `seq` writes (or wrote) entered the tree; the worker has no name yet."""
        self._last_serial += 1
        self.serial[ids] = self._last_serial
        self.published_seq[ids] = seq
        self.named_seq[ids] = UNTOLD

    def graft(self, ids: BlockIds) -> None:
        """Blocks that the worker itself named entered the tree."""
        self.publish(ids, 0)
        self.named_seq[ids] = 0

    def load(self, ids: BlockIds, seq: int) -> None:
        """Blocks that plan `seq` copies in under their names entered the tree."""
        self.publish(ids, seq)
        self.named_seq[ids] = seq

    def add(self, ids: NDArray[np.intp], names: bytes) -> None:
        """Names (16 * n bytes) of published blocks `ids` [n], to be told."""
        self.named_seq[ids] = PREPARED
        self._prepared.append(Prepared(ids, self.serial[ids], names))

    def prepare(self, tree: RadixTree) -> None:
        """Hashes what is published and has no name yet: the deferred work."""
        for node in tree.unnamed:
            ids = node.ids
            untold = np.flatnonzero(self.named_seq[ids] == UNTOLD)
            if len(untold):
                self.add(ids[untold].astype(np.intp), _pick(complete_names(tree, node), untold))
        tree.unnamed.clear()

    def take(self, seq: int, kept: NDArray[np.bool_]) -> tuple[BlockIds, bytes]:
        """What plan `seq` tells the worker: ids [n], 16 * n bytes. `kept` [num_blocks] marks the
        blocks that are still in the tree.

        Blocks written by plan `seq` itself wait: if it fails the worker must not have named them.
        """
        if not self._prepared:
            return NO_BLOCKS, b""
        ids, serials, names = Prepared.joined(self._prepared)
        valid = (self.serial[ids] == serials) & kept[ids]
        ready = valid & (self.published_seq[ids] < seq)
        self._prepared.clear()
        if np.count_nonzero(ready) < len(ready):
            later = np.flatnonzero(valid & ~ready)
            if len(later):
                self._prepared.append(Prepared(ids[later], serials[later], _pick(names, later)))
            now = np.flatnonzero(ready)
            ids, names = ids[now], _pick(names, now)
        self.named_seq[ids] = seq
        return ids.astype(np.int32), names

    def waiting(self, kept: NDArray[np.bool_]) -> BlockIds:
        """Blocks whose names are prepared: int32 [n]."""
        if not self._prepared:
            return NO_BLOCKS
        ids, serials, _ = Prepared.joined(self._prepared)
        waiting: BlockIds = ids[(self.serial[ids] == serials) & kept[ids]].astype(np.int32)
        return waiting

    def new_epoch(self, tree: RadixTree, acknowledged: int) -> None:
        """The tree holds only certain blocks now: names told by lost plans are to be told again."""
        self._prepared.clear()
        for node in tree.nodes():
            named = self.named_seq[node.ids]
            if named.max() > acknowledged or named.min() < 0:
                tree.unnamed[node] = None
        self.named_seq[(self.named_seq > acknowledged) | (self.named_seq < 0)] = UNTOLD
        self.named_seq[self.named_seq > 0] = 0
        self.published_seq[:] = 0


class Prepared(NamedTuple):
    """Names that wait for a plan."""

    ids: NDArray[np.intp]  # [n]
    serials: NDArray[np.int64]  # [n] of the publications that the names belong to
    names: bytes  # 16 * n

    @staticmethod
    def joined(parts: list[Prepared]) -> Prepared:
        """Several as one, in order."""
        if len(parts) == 1:
            return parts[0]
        ids, serials, names = zip(*parts, strict=True)
        return Prepared(np.concatenate(ids), np.concatenate(serials), b"".join(names))


def _pick(names: bytes | bytearray, which: NDArray[np.intp]) -> bytes:
    """Of names of 16 bytes those at the ascending indices `which` [n]."""
    if not len(which):
        return b""
    first, end = int(which[0]), int(which[-1]) + 1
    if end - first == len(which):
        return bytes(names[first * NAME_BYTES : end * NAME_BYTES])
    rows = np.frombuffer(bytes(names), np.uint8).reshape(-1, NAME_BYTES)
    return rows[which].tobytes()


def complete_names(tree: RadixTree, node: Node) -> bytearray:
    """Names of all of the node's blocks, 16 bytes each, hashed on demand from the root down."""
    path: list[Node] = []
    step: Node | None = node
    while step is not None and len(step.names) < NAME_BYTES * max(1, step.num_blocks):
        path.append(step)
        step = step.parent
    for step in reversed(path):
        assert step.parent is not None
        previous = bytes((step.names or step.parent.names)[-NAME_BYTES:])
        data = bytes(step.key[len(step.names) // NAME_BYTES * tree.block_bytes :])
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

    def pop_any(self, n: int) -> tuple[BlockIds, bytes]:
        """Up to n blocks leave the index: ids int32 [k <= n], names 16 * k bytes."""
        items = [self._ids.popitem() for _ in range(min(n, len(self._ids)))]
        ids = np.fromiter((block for _, block in items), np.int32, len(items))
        return ids, b"".join(name for name, _ in items)

    def block_ids(self) -> BlockIds:
        """All blocks in the index: int32 [len(self)]."""
        return np.fromiter(self._ids.values(), np.int32, len(self._ids))

    def name_of(self, block_id: int) -> bytes | None:
        """Linear search, for explanations only."""
        return next((name for name, held in self._ids.items() if held == block_id), None)
