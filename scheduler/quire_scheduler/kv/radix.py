"""The prefix cache's index: a radix tree over whole blocks, one root per namespace.

Knows which blocks hold which tokens and who locks them; not who else holds a block (blocks.py), how
names are computed (names.py) or which policy is best (eviction.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from quire_scheduler.kv.blocks import BlockAccountingError, BlockIds
from quire_scheduler.kv.eviction import PolicyKey
from quire_scheduler.kv.names import NAME_BYTES

NO_BLOCKS: BlockIds = np.zeros(0, np.int32)
ID_BYTES = 4


@dataclass(eq=False, slots=True, kw_only=True)
class Node:
    """A run of blocks. A root has no parent, no blocks, and its root name in `names`."""

    # First, side by side in memory, what grow() touches: a decoding request adds a block at a time
    # to one long node, in place.
    parent: Node | None
    key: bytearray  # tokens of the blocks, int32 little-endian [num_blocks * block_size]
    packed: bytearray  # block ids, int32 in native order [num_blocks]
    names: bytearray  # 16 bytes each of the first blocks; naming is deferred: it may be shorter
    ref: int = 0  # running requests that lock this node or one below
    children: dict[bytes, Node] = field(default_factory=dict)  # by the first block's bytes
    created: float
    last_access: float
    hits: int = 0
    stamp: int = 0  # of the valid heap entry; 0 = not evictable
    namespace: Hashable = None  # roots only

    @property
    def num_blocks(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def ids(self) -> BlockIds:
        """Block ids [num_blocks], a copy."""
        return np.frombuffer(bytes(self.packed), np.int32)


def make_node(
    parent: Node | None,
    key: bytes,
    packed: bytes,
    names: bytes,
    now: float,
    *,
    ref: int = 0,
    namespace: Hashable = None,
) -> Node:
    """A node of its own bytes, created and last used `now`."""
    return Node(
        parent=parent,
        key=bytearray(key),
        packed=bytearray(packed),
        names=bytearray(names),
        ref=ref,
        created=now,
        last_access=now,
        namespace=namespace,
    )


class MatchResult(NamedTuple):
    """A cursor: the first `num_in_node` blocks of `node`. Valid until the tree next changes."""

    node: Node
    num_in_node: int
    block_ids: BlockIds  # [num_matched] from the root on


class InsertResult(NamedTuple):
    """What became of the inserted blocks: leading ones shared, then displacing, the rest new."""

    node: Node  # the new cursor; the caller's lock moved there
    shared: BlockIds  # [a] equal blocks that others lock: kept, the caller's own stay private
    displaced: BlockIds  # [b] equal blocks nobody locked: out of the tree, the caller's are in


class RadixTree:
    """match() looks, lock() protects and gives the cursor, insert() goes on from it, unlock() ends.

    A node is evictable when it is a leaf and nobody locks it. `unnamed` gathers nodes with blocks
    whose name the worker has not been told; whoever tells it takes them out.
    """

    def __init__(
        self,
        block_bytes: int,
        policy: Callable[[Node], PolicyKey],
        clock: Callable[[], float],
        root_name: Callable[[Hashable], bytes],
    ) -> None:
        self.block_bytes = block_bytes
        # The mutable state, owned by this class; the manager reads it and shrinks `unnamed`.
        self.roots: dict[Hashable, Node] = {}
        self.unnamed: dict[Node, None] = {}
        self.evictable: set[Node] = set()
        self._heap: list[tuple[PolicyKey, int, Node]] = []  # lazy: stale where stamps differ
        self._stamp = 0
        self._policy, self._clock, self._root_name = policy, clock, root_name

    def match(self, namespace: Hashable, data: bytes, max_blocks: int) -> MatchResult:
        """The longest cached prefix of `data`, at most max_blocks whole blocks; changes nothing."""
        node = self.roots.get(namespace)
        if node is None:
            now = self._clock()
            root = make_node(None, b"", b"", b"", now, namespace=namespace)
            return MatchResult(root, 0, NO_BLOCKS)
        step = self.block_bytes
        pos, end = 0, max_blocks * step
        num_in_node = 0
        parts: list[bytearray] = []
        while pos < end:
            child = node.children.get(data[pos : pos + step])
            if child is None:
                break
            node = child
            if pos + len(child.key) <= end and data.startswith(child.key, pos):
                pos += len(child.key)
                num_in_node = child.num_blocks
                parts.append(child.packed)
                continue
            num_in_node = self._common_blocks(child.key, data, pos, end)
            parts.append(child.packed[: num_in_node * ID_BYTES])
            break
        return MatchResult(node, num_in_node, np.frombuffer(b"".join(parts), np.int32))

    def lock(self, match: MatchResult) -> Node:
        """Protects the match and everything above it; returns the receipt, also the cursor."""
        node = match.node
        if match.num_in_node < node.num_blocks:
            node = self._split(node, match.num_in_node)
        elif node.parent is None and node.namespace not in self.roots:
            node.names = bytearray(self._root_name(node.namespace))
            self.roots[node.namespace] = node
        elif node.parent is None:
            node = self.roots[node.namespace]
        now = self._clock()
        step: Node | None = node
        while step is not None:
            self._hold(step, now)
            step.hits += 1
            step = step.parent
        return node

    def unlock(self, node: Node) -> None:
        """Takes a receipt back. Blocks stay; what nobody locks any more may be evicted."""
        now = self._clock()
        step: Node | None = node
        while step is not None:
            if step.ref < 1:
                raise BlockAccountingError("a receipt was given back twice")
            step.ref -= 1
            step.last_access = now
            step = step.parent
        self._settle(node)

    def insert(self, node: Node, data: bytes, ids: BlockIds, names: bytes = b"") -> InsertResult:
        """Adds blocks `ids` [n] holding `data` after `node`, which the caller has locked.

        The caller's lock moves to the returned cursor. Equal blocks already there are never added
        twice: see InsertResult. `names` are those of all n blocks if they are known already.
        """
        step, n = self.block_bytes, len(ids)
        done, now = 0, self._clock()
        shared: list[BlockIds] = []
        displaced: list[BlockIds] = []
        while done < n:
            child = node.children.get(data[done * step : (done + 1) * step])
            if child is None:
                break
            common = self._common_blocks(child.key, data, done * step, n * step)
            if common < child.num_blocks:
                child = self._split(child, common)
            if child.ref:
                shared.append(child.ids)
            else:
                displaced.append(child.ids)
                child.packed = bytearray(ids[done : done + common].tobytes())
                self.unnamed[child] = None
            self._hold(child, now)
            node = child
            done += common
        if done < n:
            key, packed, new_names = (
                data[done * step :],
                ids[done:].tobytes(),
                names[done * NAME_BYTES :],
            )
            if node.parent is not None and node.ref == 1 and not node.children:
                node.key += key  # alone on a leaf: a decoding request grows one node
                node.packed += packed
                node.names += new_names
            else:
                leaf = make_node(node, key, packed, new_names, now, ref=1)
                node.children[key[:step]] = leaf
                node = leaf
            if not new_names:
                self.unnamed[node] = None
        return InsertResult(node, _joined(shared), _joined(displaced))

    def grow(
        self,
        nodes: Sequence[Node],
        data: bytes,
        packed: bytes,
        next_name: Callable[[bytes | bytearray, bytes], bytes],
    ) -> tuple[list[bytes], list[int]]:
        """insert() of one block for each of `nodes` [n], whose callers hold them: data [n] blocks
        of tokens, packed [n] ids, both as bytes; next_name(name before, block's bytes).

        Returns the names of the blocks added, and the indices of nodes that need insert() itself:
        those that are not a leaf of one request, or have blocks without a name.
        """
        step = self.block_bytes
        blocks = [data[at : at + step] for at in range(0, len(data), step)]
        numbers = [packed[at : at + ID_BYTES] for at in range(0, len(packed), ID_BYTES)]
        names: list[bytes] = []
        others: list[int] = []
        for node, block, number in zip(nodes, blocks, numbers, strict=True):
            known = node.names
            alone = node.ref == 1 and not node.children and node.parent is not None
            if alone and len(known) * ID_BYTES == len(node.packed) * NAME_BYTES:
                name = next_name(known[-NAME_BYTES:], block)
                node.key += block
                node.packed += number
                known += name
                names.append(name)
            else:
                others.append(len(names) + len(others))
        return names, others

    def depth(self, node: Node) -> int:
        """Blocks above the node's first one."""
        count, step = 0, node.parent
        while step is not None:
            count += step.num_blocks
            step = step.parent
        return count

    def victim(self) -> Node | None:
        """The policy's next leaf, of which eviction is to cut the tail; None if none may go."""
        while self._heap:
            _, stamp, node = self._heap[0]
            if stamp == node.stamp:
                return node
            heapq.heappop(self._heap)
        return None

    def evict(self, max_blocks: int) -> BlockIds:
        """Drops up to max_blocks blocks from the tail of the victim; empty if there is none."""
        node = self.victim()
        return NO_BLOCKS if node is None else self.cut(node, max(0, node.num_blocks - max_blocks))

    def cut(self, node: Node, num_left: int) -> BlockIds:
        """Keeps the first num_left blocks of an unlocked leaf; returns the others."""
        if node.ref or node.children or node.parent is None:
            raise BlockAccountingError("only an unlocked leaf can be cut")
        gone = np.frombuffer(bytes(node.packed[num_left * ID_BYTES :]), np.int32)
        if num_left:
            del node.key[num_left * self.block_bytes :]
            del node.packed[num_left * ID_BYTES :]
            del node.names[num_left * NAME_BYTES :]
            return gone
        parent = node.parent
        del parent.children[bytes(node.key[: self.block_bytes])]
        node.parent = None
        node.stamp = 0
        self.evictable.discard(node)
        self.unnamed.pop(node, None)
        self._settle(parent)
        return gone

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Raises BlockAccountingError where the tree's own invariants fail."""
        for namespace, root in self.roots.items():
            if root.namespace != namespace or not (root.children or root.ref):
                raise BlockAccountingError(f"root {namespace!r} is misplaced or abandoned")
        evictable: set[Node] = set()
        for node in self.nodes():
            parent = node.parent
            if len(node.key) != node.num_blocks * self.block_bytes or not node.num_blocks:
                raise BlockAccountingError("an edge and its blocks differ in length")
            first = bytes(node.key[: self.block_bytes])
            if parent is None or parent.children.get(first) is not node:
                raise BlockAccountingError("a node is not its parent's child")
            if node.ref < sum(child.ref for child in node.children.values()):
                raise BlockAccountingError("a node has fewer locks than its children")
            if not node.ref and not node.children:
                evictable.add(node)
        if evictable != self.evictable:
            raise BlockAccountingError("the evictable leaves differ from the recomputed ones")
        valid = {node for _, stamp, node in self._heap if stamp == node.stamp}
        if valid != evictable:
            raise BlockAccountingError("the eviction heap misses an evictable leaf")

    def _common_blocks(self, key: bytearray, data: bytes, pos: int, end: int) -> int:
        """Whole blocks that `key` and data[pos:end] begin with alike."""
        size = min(len(key), end - pos)
        if data.startswith(key[:size], pos):
            return size // self.block_bytes
        ours = np.frombuffer(key, np.int32, size // 4)
        theirs = np.frombuffer(data, np.int32, size // 4, pos)
        return int((ours != theirs).argmax()) * 4 // self.block_bytes

    def _split(self, node: Node, k: int) -> Node:
        """Moves the first k blocks into a new parent of `node`; cursors at its end stay valid."""
        parent, cut = node.parent, k * self.block_bytes
        assert parent is not None
        upper = Node(
            parent=parent,
            key=node.key[:cut],
            packed=node.packed[: k * ID_BYTES],
            names=node.names[: k * NAME_BYTES],
            ref=node.ref,
            created=node.created,
            last_access=node.last_access,
            hits=node.hits,
        )
        parent.children[bytes(upper.key[: self.block_bytes])] = upper
        node.parent = upper
        del node.key[:cut], node.packed[: k * ID_BYTES], node.names[: k * NAME_BYTES]
        upper.children[bytes(node.key[: self.block_bytes])] = node
        if node in self.unnamed:
            self.unnamed[upper] = None
        return upper

    def _hold(self, node: Node, now: float) -> None:
        if node.stamp:
            node.stamp = 0
            self.evictable.discard(node)
        node.ref += 1
        node.last_access = now

    def _settle(self, node: Node) -> None:
        """A lock or child went: an idle leaf becomes evictable, an idle root is forgotten."""
        if node.ref or node.children or node.stamp:
            return
        if node.parent is None:
            self.roots.pop(node.namespace, None)
            return
        if len(self._heap) > 64 + 4 * len(self.evictable):
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].stamp]
            heapq.heapify(self._heap)
        self._stamp += 1
        node.stamp = self._stamp
        self.evictable.add(node)
        heapq.heappush(self._heap, (self._policy(node), node.stamp, node))


def _joined(parts: list[BlockIds]) -> BlockIds:
    return np.concatenate(parts) if parts else NO_BLOCKS
