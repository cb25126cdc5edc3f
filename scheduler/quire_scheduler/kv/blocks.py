"""The pool of KV blocks as numbers: who holds each one, which are free, which wait for a fence.

Does not know tokens, prefixes, requests or tensors. Block 0 is the null block, never handed out.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int32]

NULL_BLOCK = 0


class BlockAccountingError(RuntimeError):
    """The books do not balance: a bug in the scheduler, never a caller's bad input."""


class BlockPool:
    """Every block but the null one is free, used, cached or fenced.

    free: in the stack. used: held by a request. cached: held by nobody, kept for its content.
    fenced: held only by fences, i.e. by orders outside plan order that still touch it.
    Ids within one call are distinct. All arrays are int32 and belong to this class alone.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool of {num_blocks} blocks has none to hand out: give at least 2")
        self.num_blocks = num_blocks
        # The mutable state; written only here, read by check() and explain() of the manager.
        self.refs = np.zeros(num_blocks, np.int32)  # [num_blocks] holders, fences included
        self.fence_refs = np.zeros(num_blocks, np.int32)  # [num_blocks] fences among them
        self.kept = np.zeros(num_blocks, np.bool_)  # [num_blocks] an index keeps the content
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # [:num_free] are free
        self._where = np.full(num_blocks, -1, np.int32)  # [num_blocks] index in _stack or -1
        self._where[self._stack] = np.arange(num_blocks, dtype=np.int32)
        self._where[NULL_BLOCK] = -1
        self._fences: deque[tuple[int, BlockIds]] = deque()  # (fence_seq, ids), seq ascending
        self.num_free = num_blocks - 1
        self.num_cached = 0

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_fenced(self) -> int:
        if not self._fences:
            return 0
        return int(np.count_nonzero((self.refs > 0) & (self.refs == self.fence_refs)))

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free - self.num_cached - self.num_fenced

    def is_free(self, block_id: int) -> bool:
        return bool(self._where[block_id] >= 0)

    def allocate(self, n: int) -> BlockIds | None:
        """Takes n free blocks, each with one holder: int32 [n], or None and nothing changes."""
        if n > self.num_free:
            return None
        top = self.num_free
        ids = self._stack[top - n : top][::-1].copy()
        self.num_free = top - n
        at = ids.astype(np.intp)  # what numpy indexes with fastest
        self._where[at] = -1
        self.refs[at] = 1
        return ids

    def take(self, ids: BlockIds) -> None:
        """Unlinks free blocks from the free stack and keeps them as cached, in O(1) each."""
        stack, where = self._stack, self._where
        for block_id in ids.tolist():
            index = int(where[block_id])
            if index < 0:
                raise BlockAccountingError(f"block {block_id} is taken but it is not free")
            self.num_free -= 1
            last = stack[self.num_free]
            stack[index] = last
            where[last] = index
            where[block_id] = -1
        self.kept[ids] = True
        self.num_cached += len(ids)

    def retain(self, ids: BlockIds) -> None:
        """One more holder for blocks that are used, fenced or cached."""
        held = self.refs[ids]
        idle = ids[held == 0]
        if len(idle):
            if not self.kept[idle].all():
                bad = int(idle[~self.kept[idle]][0])
                raise BlockAccountingError(f"block {bad} is retained but nobody keeps it")
            self.num_cached -= len(idle)
        self.refs[ids] = held + 1

    def release(self, ids: BlockIds) -> None:
        """One holder less; a block without holders becomes cached if it is kept, else free."""
        left = self.refs[ids] - 1
        if len(ids) and left.min() < 0:
            bad = int(ids[left < 0][0])
            raise BlockAccountingError(f"block {bad} is released but nobody holds it")
        self.refs[ids] = left
        idle = ids[left == 0]
        if len(idle):
            kept = self.kept[idle]
            self.num_cached += int(np.count_nonzero(kept))
            self._push(idle[~kept])

    def keep(self, ids: BlockIds | NDArray[np.intp]) -> None:
        """Marks held blocks: their content stays when the last holder lets go."""
        lost = self.refs[ids] < 1
        if np.count_nonzero(lost):
            raise BlockAccountingError(f"block {ids[lost][0]} is to be kept but nobody holds it")
        self.kept[ids] = True

    def unkeep(self, ids: BlockIds) -> None:
        """Takes the mark away; blocks without holders become free."""
        if not self.kept[ids].all():
            bad = int(ids[~self.kept[ids]][0])
            raise BlockAccountingError(f"block {bad} is dropped but it was not kept")
        self.kept[ids] = False
        idle = ids[self.refs[ids] == 0]
        self.num_cached -= len(idle)
        self._push(idle)

    def fence(self, ids: BlockIds, seq: int) -> None:
        """Hands the caller's hold to a fence: pass_fence(seq) releases it.

        First in, first out: behind a later fence it waits for that one.
        """
        if len(ids):
            self.fence_refs[ids] += 1
            last = self._fences[-1][0] if self._fences else seq
            self._fences.append((max(seq, last), ids.copy()))

    def pass_fence(self, seq: int) -> None:
        """Everything up to plan `seq` is done: releases what waited for it."""
        while self._fences and self._fences[0][0] <= seq:
            _, ids = self._fences.popleft()
            self.fence_refs[ids] -= 1
            self.release(ids)

    def refence(self, seq: int) -> None:
        """New epoch: what is still fenced now waits for plan `seq` of the new numbering."""
        self._fences = deque((seq, ids) for _, ids in self._fences)

    def check(self) -> None:
        """Raises unless free + fenced + cached + used == total and all are disjoint."""
        free = np.sort(self._stack[: self.num_free])
        if len(np.unique(free)) != len(free):
            raise BlockAccountingError("the free stack holds a block twice")
        if self.refs[NULL_BLOCK] or self.kept[NULL_BLOCK] or NULL_BLOCK in free:
            raise BlockAccountingError("the null block was handed out")
        is_free = self._where >= 0
        if not np.array_equal(np.flatnonzero(is_free), free):
            raise BlockAccountingError("the free stack and its index disagree")
        wrong = np.flatnonzero(is_free & ((self.refs != 0) | self.kept))
        if len(wrong):
            raise BlockAccountingError(f"block {wrong[0]} is free but held or kept")
        fence_refs = np.zeros_like(self.fence_refs)
        for _, ids in self._fences:
            fence_refs[ids] += 1
        if not np.array_equal(fence_refs, self.fence_refs):
            raise BlockAccountingError("fence counts differ from the fences in the queue")
        wrong = np.flatnonzero((self.refs < fence_refs) | (self.refs < 0))
        if len(wrong):
            raise BlockAccountingError(f"block {wrong[0]} has fewer holders than fences")
        cached = int(np.count_nonzero((self.refs == 0) & self.kept))
        if cached != self.num_cached:
            raise BlockAccountingError(f"{self.num_cached} blocks counted cached, {cached} are")
        fenced = int(np.count_nonzero((self.refs > 0) & (self.refs == fence_refs)))
        used = int(np.count_nonzero(self.refs > fence_refs))
        if self.num_free + fenced + cached + used != self.num_usable:
            raise BlockAccountingError(
                f"free {self.num_free} + fenced {fenced} + cached {cached} + used {used} "
                f"!= total {self.num_usable}"
            )

    def _push(self, ids: BlockIds) -> None:
        """Onto the free stack, the first id on top."""
        n = len(ids)
        if n:
            top = self.num_free
            self._stack[top : top + n] = ids[::-1]
            self._where[ids[::-1]] = np.arange(top, top + n, dtype=np.int32)
            self.num_free = top + n
