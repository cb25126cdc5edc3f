"""The simulated KV memory: for each block who may write it, how much of it is written, and the
state (tokens.py) of the prefix that its last position ends.

That is enough to notice a block freed too early, shared wrongly, written twice, out of order or
never: a block is written by its owner alone, position after position; it gets a new owner only
when no slot holds it; and a slot that shares blocks must find its own prefix in them. Knows no
plan and no request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire_worker.columns import PlanError

NOBODY = -1


class Violation(PlanError):
    """A plan broke a rule of the protocol."""


class SimulatedMemory:
    """Blocks of the device tier and of the host tier. All arrays are [num_blocks] of a tier."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.owner = np.full(num_blocks, NOBODY, np.int32)  # the slot that writes it
        self.holders = np.zeros(num_blocks, np.int32)  # slots that have it in their table
        self.filled = np.zeros(num_blocks, np.int32)  # positions written, from the first on
        self.content = np.zeros(num_blocks, np.uint64)  # state at the last position written
        self.names: dict[int, bytes] = {}  # device block -> name
        self.host_content = np.zeros(num_host_blocks, np.uint64)
        self.host_names: dict[int, bytes] = {}
        self.num_copied = {"offload": 0, "load": 0}  # blocks
        self._name_content: dict[bytes, int] = {}  # name -> state at the block's end, for good

    # -- who has what -----------------------------------------------------------------------
    def forget_slots(self) -> None:
        """A new epoch: nobody holds anything; content and names stay."""
        self.owner[:] = NOBODY
        self.holders[:] = 0

    def release(self, slot: int, blocks: np.ndarray) -> None:
        """The slot gives its whole table [n] up."""
        self.holders[blocks] -= 1
        self.owner[blocks[self.owner[blocks] == slot]] = NOBODY

    def take(self, blocks: np.ndarray, slots: np.ndarray) -> None:
        """Blocks [n] get new owners, slots [n]: what was in them is gone."""
        self._claim(blocks)
        self.owner[blocks] = slots
        self.holders[blocks] = 1

    def share(self, blocks: np.ndarray) -> None:
        """A slot has these blocks [n] in its table, to read."""
        self.holders[blocks] += 1

    def resume(self, slot: int, block: int, filled: int, state: int) -> None:
        """The slot goes on writing a block of which `filled` positions hold its prefix."""
        held, content = self.holders[block] > 0, self.content[block]
        if held or self.filled[block] != filled or content != state:
            raise Violation(f"slot {slot} can't go on in block {block} at offset {filled}")
        self.owner[block], self.holders[block] = slot, 1

    def _claim(self, blocks: np.ndarray) -> None:
        if len(blocks) and int(blocks.min()) < 1:
            raise Violation("block 0 belongs to nobody, yet it is given out")
        if len(np.unique(blocks)) != len(blocks):
            raise Violation(f"a block is given out twice in a plan: {sorted(blocks.tolist())}")
        held = blocks[self.holders[blocks] > 0]
        if len(held):
            raise Violation(f"block {held[0]} gets a new owner while a slot holds it")
        self.filled[blocks] = 0
        if self.names:
            for block in blocks.tolist():
                self.names.pop(block, None)

    # -- KV ---------------------------------------------------------------------------------
    def write_last(
        self, slots: np.ndarray, blocks: np.ndarray, offsets: np.ndarray, states: np.ndarray
    ) -> None:
        """One position for each of n slots: states u64 [n] at offsets [n] of blocks [n]."""
        wrong = (self.owner[blocks] != slots) | (self.filled[blocks] != offsets)
        if wrong.any():
            i = int(wrong.argmax())
            self._refuse(int(slots[i]), int(blocks[i]), int(offsets[i]))
        self.filled[blocks] = offsets + 1
        self.content[blocks] = states

    def write_span(self, slot: int, blocks: np.ndarray, start: int, states: np.ndarray) -> None:
        """Positions start ... start + len(states) - 1 of a slot, of which `blocks` is the part of
        its table that they lie in; states u64 [n]."""
        size = self.block_size
        end = start + len(states)
        begins = np.zeros(len(blocks), np.int32)
        begins[0] = start % size
        wrong = (self.owner[blocks] != slot) | (self.filled[blocks] != begins)
        if wrong.any():
            i = int(wrong.argmax())
            self._refuse(slot, int(blocks[i]), int(begins[i]))
        first = start // size
        lasts = np.minimum((np.arange(len(blocks)) + first + 1) * size, end)  # [n] beyond the last
        self.filled[blocks] = lasts - (np.arange(len(blocks)) + first) * size
        self.content[blocks] = states[lasts - 1 - start]

    def _refuse(self, slot: int, block: int, offset: int) -> None:
        owner, filled = int(self.owner[block]), int(self.filled[block])
        if owner != slot:
            who = "nobody" if owner == NOBODY else f"slot {owner}"
            raise Violation(f"slot {slot} writes block {block}, which is {who}'s")
        raise Violation(
            f"slot {slot} writes block {block} at offset {offset}; {filled} positions of it are "
            "written"
        )

    def check_shared(self, who: str, blocks: np.ndarray, states: np.ndarray) -> None:
        """Blocks [n] must be full and hold the prefix whose states at their ends are [n]."""
        wrong = (self.filled[blocks] != self.block_size) | (self.content[blocks] != states)
        if wrong.any():
            i = int(wrong.argmax())
            raise Violation(f"{who}: block {blocks[i]}, {i} of its table, holds another prefix")

    # -- names and tiers --------------------------------------------------------------------
    def name(self, block: int, name: bytes) -> None:
        """A full block gets its name; the same name never stands for two contents."""
        self._called(name, "device", block, int(self.filled[block]), int(self.content[block]))
        self.names[block] = name

    def zero(self, blocks: np.ndarray) -> None:
        self._claim(blocks)

    def offload(self, blocks: np.ndarray, host: np.ndarray, names: Sequence[bytes]) -> None:
        """Device blocks [n] to host blocks [n], which take the names over."""
        self.host_content[host] = self.content[blocks]
        self.num_copied["offload"] += len(blocks)
        for block, target, name in zip(blocks.tolist(), host.tolist(), names, strict=True):
            self._called(name, "device", block, int(self.filled[block]), int(self.content[block]))
            self.host_names[target] = name

    def load(self, host: np.ndarray, blocks: np.ndarray, names: Sequence[bytes]) -> None:
        """Host blocks [n] to device blocks [n], which take the names over."""
        self._claim(blocks)
        self.filled[blocks] = self.block_size
        self.content[blocks] = self.host_content[host]
        self.num_copied["load"] += len(blocks)
        for source, block, name in zip(host.tolist(), blocks.tolist(), names, strict=True):
            if self.host_names.get(source) != name:
                raise Violation(f"host block {source} does not hold {name.hex()}")
            self.names[block] = name

    def _called(self, name: bytes, tier: str, block: int, filled: int, content: int) -> None:
        if filled != self.block_size:
            raise Violation(
                f"{tier} block {block} is named with {filled} of {self.block_size} positions "
                "written"
            )
        if self._name_content.setdefault(name, content) != content:
            raise Violation(f"name {name.hex()} stands for two contents")
