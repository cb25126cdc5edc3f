"""The content names of one tier's blocks; they outlive slots and epochs.

Knows no tensors and no plans. A block without a name holds nothing that anybody may rely on.
"""

from __future__ import annotations

import numpy as np

from quire.wire import NAME_BYTES


class BlockNames:
    """Ids are integer arrays [n] of blocks that exist. Written by the runner's thread only."""

    def __init__(self, num_blocks: int) -> None:
        self.names = np.zeros((num_blocks, NAME_BYTES), np.uint8)
        self.is_named = np.zeros(num_blocks, bool)

    def give(self, ids: np.ndarray, names: np.ndarray) -> None:
        """names: u8 [n, 16]."""
        self.names[ids] = names
        self.is_named[ids] = True

    def forget(self, ids: np.ndarray) -> None:
        self.is_named[ids] = False

    def held(self) -> tuple[bytes, bytes]:
        """(ids as i32, names of 16 bytes each) of the blocks that have one."""
        held = np.flatnonzero(self.is_named).astype("<i4")
        return held.tobytes(), self.names[held].tobytes()
