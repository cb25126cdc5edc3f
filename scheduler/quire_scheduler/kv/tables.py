"""Block tables: which blocks each running request reads, one row a request.

Knows no tokens and no pool. Rows are the caller's slots, so that what happens to many
requests in a step is one numpy operation.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.blocks import BlockIds
from quire_scheduler.kv.radix import Node

Rows = NDArray[np.intp]
_ONE = np.ones(1, np.int32)

_NORESERVE = 0x4000 if hasattr(mmap, "MADV_NOHUGEPAGE") else 0  # Linux; no name in Python 3.11


def lazy_matrix(rows: int, columns: int) -> NDArray[np.int32]:
    """int32 zeros [rows, columns] that take memory page by page as they are written.

    np.zeros asks for huge pages: writing the head of each row would take 2 MiB for each of them.
    """
    size = max(4 * rows * columns, 1)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    if _NORESERVE:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int32, rows * columns).reshape(rows, columns)


class BlockTables:
    """Per row a list of block ids that only grows, until the row is given up."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        # The mutable state; the manager writes num_published and nodes, this class the rest.
        self.ids = lazy_matrix(max_rows, max_blocks)  # [max_rows, max_blocks]
        self.num_blocks = np.zeros(max_rows, np.int32)  # [max_rows]
        self.num_published = np.zeros(max_rows, np.int32)  # [max_rows] leading ones
        self.live = np.zeros(max_rows, np.bool_)  # [max_rows]
        self.nodes: list[Node | None] = [None] * max_rows  # the request's cursor in the tree
        self._flat = self.ids.reshape(-1)
        self._width = max_blocks

    def open(self, row: int | None) -> int:
        """A row, by default the first free one, begins empty; its number."""
        if row is None:
            row = int(self.live.argmin())
        if self.live[row]:
            raise ValueError(f"row {row} of the block tables is taken: release its handle first")
        self.live[row] = True
        return row

    def close(self, row: int) -> None:
        self.live[row] = False
        self.nodes[row] = None
        self.num_blocks[row] = self.num_published[row] = 0

    def of(self, row: int) -> BlockIds:
        """int32 [num_blocks]: a view, valid until the row is closed."""
        ids: BlockIds = self.ids[row, : self.num_blocks[row]]
        return ids

    def extend(self, row: int, ids: BlockIds) -> None:
        """Blocks `ids` [n] at the end of a row."""
        have = int(self.num_blocks[row])
        self.ids[row, have : have + len(ids)] = ids
        self.num_blocks[row] = have + len(ids)

    def append(self, rows: Rows, counts: NDArray[np.int32] | None, ids: BlockIds) -> None:
        """Blocks `ids` [sum(counts)] at the ends of distinct `rows` [n], in order; counts >= 1,
        None = one each."""
        have = self.num_blocks[rows]
        at = rows * self._width + have
        if counts is None:
            counts = _ONE
        elif len(ids) != len(rows):
            before = np.cumsum(counts) - counts
            at = np.repeat(at - before, counts) + np.arange(len(ids))
        self._flat[at] = ids
        self.num_blocks[rows] = have + counts
