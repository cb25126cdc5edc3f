"""The host tier: which content lies in which host block, and the copies of the plan being built.

Knows names, block numbers of both tiers and what a copy costs; not tokens, prefixes or requests.
Copies run in plan order, before the rows of their plan and one after the other, so a block is free
for others as soon as its copy is ordered (docs/decisions/0008).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, takewhile

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.blocks import BlockAccountingError, BlockIds
from quire_scheduler.kv.names import NAME_BYTES

SMOOTHING = 0.1
UNSENT = 1 << 62  # the plan that makes the copy has not been sent


@dataclass(slots=True)
class Order:
    """Blocks that go the same way at once: the device's to the host, or back."""

    op_id: int
    is_load: bool
    src: list[int] = field(default_factory=list)  # [n] of the tier they leave
    dst: dict[int, None] = field(default_factory=dict)  # [n] of the other, distinct, in order
    names: list[bytes] = field(default_factory=list)  # [n] what they hold

    def __len__(self) -> int:
        return len(self.src)


@dataclass(slots=True)
class HostStats:
    """Running totals, in blocks."""

    offloaded: int = 0
    loaded: int = 0
    lost: int = 0  # evicted from the device without a copy
    dropped: int = 0  # evicted from the host


class HostTier:
    """Content by name, least recently used first. A block is free or holds one named content.

    copy_s: seconds that one block takes in either direction. recompute_s(first, n): seconds it
    takes to compute n tokens from position `first` on; both are corrected as steps are seen.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        copy_s: float,
        recompute_s: Callable[[int, int], float],
        clock: Callable[[], float],
        *,
        block_bytes: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.copy_s = copy_s
        self.recompute_s = recompute_s
        self.limit_s = 0.0  # what the copies of the plan being built may take
        self.stats = HostStats()
        self._clock = clock
        self._last_op = 0
        self.reset()

    def reset(self) -> None:
        """The worker's memory is gone. Stats go on."""
        # The mutable state, written only here.
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # name -> block, oldest use first
        self._stack = np.arange(self.num_blocks - 1, -1, -1, dtype=np.int32)  # [:num_free]
        self._seq = np.zeros(self.num_blocks, np.int64)  # [num_blocks] plan that wrote it; 0 = sure
        self._since = np.zeros(self.num_blocks)  # [num_blocks] clock reading
        self._hits = np.zeros(self.num_blocks, np.int32)  # [num_blocks] times it was loaded
        self.orders: list[Order] = []  # of the plan being built, in the order they run
        self._ordered = [0, 0]  # blocks in them: offloads, loads
        self._pinned: frozenset[bytes] = frozenset()

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    @property
    def num_used(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._blocks)

    # -- what it is worth

    def pays(self, num_blocks: int) -> bool:
        """Whether to keep the first `num_blocks` blocks of a sequence: there and back in less time
        than computing their tokens anew."""
        return 2 * self.copy_s * num_blocks < self.recompute_s(0, num_blocks * self.block_size)

    def saves(self, first_block: int) -> bool:
        """Whether to load a block that is here, instead of computing its tokens."""
        size = self.block_size
        return self.copy_s < self.recompute_s(first_block * size, size)

    def room(self, *, loads: bool) -> int:
        """Blocks that the plan being built may still copy this way. Each way has half of the
        limit, and at least one block, so that whoever waits for loads gets on."""
        most = max(1, int(self.limit_s / 2 / self.copy_s)) if self.copy_s else self.num_blocks
        return max(0, most - self._ordered[loads])

    def observe(self, num_blocks: int, seconds: float) -> None:
        """So many copies took so long."""
        self.copy_s += SMOOTHING * (seconds / num_blocks - self.copy_s)

    # -- copies of the plan being built

    def offload(self, ids: BlockIds, names: bytes, num_before: int) -> None:
        """Device blocks `ids` [n] are about to be handed out; `names` (16 * n bytes) is what they
        hold, behind `num_before` blocks of their sequence. Keeps what pays and fits."""
        room = self.room(loads=False) if self.pays(num_before + len(ids)) else 0
        column = [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]
        missing = [i for i, name in enumerate(column) if name not in self._blocks]
        # A block is worth nothing without those before it: where not all fit the first ones come
        # here, and the last ones are put down as used the longest ago.
        chosen = set(missing[:room])
        self.stats.lost += len(missing) - len(chosen)
        for i in range(len(column) - 1, -1, -1):
            if i not in chosen:
                if column[i] in self._blocks:
                    self._blocks.move_to_end(column[i])
                continue
            host_id = self._take()
            if host_id is None:
                self.stats.lost += 1
                continue
            self._put(column[i], host_id, UNSENT)
            self._order(False, int(ids[i]), host_id, column[i])

    def find(self, names: Iterable[bytes], most: int) -> list[bytes]:
        """The leading ones of `names` that are here, at most so many."""
        return list(islice(takewhile(self._blocks.__contains__, names), most))

    def pin(self, names: list[bytes]) -> None:
        """These are going to be loaded: offloads do not take their place until load()."""
        self._pinned = frozenset(names)
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def load(self, names: list[bytes], ids: BlockIds) -> None:
        """Copies the pinned content `names` [n] to device blocks `ids` [n]. It stays here too."""
        for name, block_id in zip(names, ids.tolist(), strict=True):
            host_id = self._blocks[name]
            self._hits[host_id] += 1
            self._order(True, host_id, block_id, name)
        self._pinned = frozenset()

    def take(self, seq: int) -> list[Order]:
        """The copies of plan `seq`, in the order in which they must run."""
        self._pinned = frozenset()
        orders = self.orders
        for order in orders:
            if order.is_load:
                self.stats.loaded += len(order)
            else:
                self.stats.offloaded += len(order)
                written = np.fromiter(order.dst, np.int32, len(order))
                self._seq[written[self._seq[written] == UNSENT]] = seq
        self.orders, self._ordered = [], [0, 0]
        return orders

    @property
    def num_ordered_loads(self) -> int:
        return self._ordered[True]

    # -- recovery

    def drop_unacknowledged(self, acknowledged: int) -> None:
        """New epoch: what plans after `acknowledged` were to copy here is forgotten."""
        for name, block in list(self._blocks.items()):
            if self._seq[block] > acknowledged:
                self._remove(name)
        self.orders, self._ordered = [], [0, 0]
        self._pinned = frozenset()

    def next_epoch(self) -> None:
        """Every plan sent is answered. Copies that wait for a plan go on waiting."""
        self._seq[self._seq != UNSENT] = 0

    def adopt(self, ids: NDArray[np.int32], names: bytes) -> int:
        """Content that the worker says it holds: blocks `ids` [n], `names` (16 * n bytes). Passed
        over: blocks and names known already, ids that do not exist. Returns how many were new."""
        used = set(self._blocks.values())
        num_before = len(used)
        for i, block in enumerate(ids.tolist()):
            name = names[i * NAME_BYTES : (i + 1) * NAME_BYTES]
            if 0 <= block < self.num_blocks and block not in used and name not in self._blocks:
                used.add(block)
                self._put(name, block, 0)
        is_free = np.ones(self.num_blocks, bool)
        is_free[list(used)] = False
        self._stack[: self.num_free] = np.flatnonzero(is_free)[::-1]
        return len(used) - num_before

    # -- looking

    def look(self, block: int) -> tuple[bytes | None, float | None, int]:
        """(name, age in seconds, times loaded) of a block; IndexError if there is none such. A
        search: for people."""
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"host block {block} does not exist: the tier has {self.num_blocks}")
        name = next((name for name, held in self._blocks.items() if held == block), None)
        if name is None:
            return None, None, 0
        return name, self._clock() - float(self._since[block]), int(self._hits[block])

    def most_hit(self, count: int) -> list[int]:
        """Up to so many blocks that hold something, by how often they were loaded, most first."""
        blocks = sorted(self._blocks.values(), key=lambda block: -int(self._hits[block]))
        return blocks[:count]

    def check(self) -> None:
        """Raises BlockAccountingError unless every block is free or holds exactly one content."""
        both = [*self._stack[: self.num_free].tolist(), *self._blocks.values()]
        if sorted(both) != list(range(self.num_blocks)):
            raise BlockAccountingError("a host block is lost, or free and in use, or used twice")
        if any(len(name) != NAME_BYTES for name in self._blocks):
            raise BlockAccountingError("a host block has a name that is none")
        unsent = {block for block in self._blocks.values() if self._seq[block] == UNSENT}
        written = {block for order in self.orders if not order.is_load for block in order.dst}
        if not unsent <= written:
            raise BlockAccountingError("a host block waits for a copy that nobody ordered")
        counts = [sum(len(o) for o in self.orders if o.is_load == way) for way in (False, True)]
        if counts != self._ordered:
            raise BlockAccountingError("the ordered copies are counted wrongly")

    # -- inside

    def _take(self) -> int | None:
        """A block to write to, by evicting the least recently used content; None if all are
        about to be loaded."""
        if not self.num_free:
            name = next(iter(self._blocks))
            if name in self._pinned:  # what is older is gone, what is younger was just put here
                return None
            self._remove(name)
            self.stats.dropped += 1
        return int(self._stack[self.num_free - 1])

    def _put(self, name: bytes, block: int, seq: int) -> None:
        self._blocks[name] = block
        self._seq[block] = seq
        self._since[block] = self._clock()
        self._hits[block] = 0

    def _remove(self, name: bytes) -> None:
        block = self._blocks.pop(name)
        self._stack[self.num_free - 1] = block

    def _order(self, is_load: bool, src: int, dst: int, name: bytes) -> None:
        """Behind all that is ordered so far; blocks that go the same way share an order."""
        last = self.orders[-1] if self.orders else None
        if last is None or last.is_load != is_load or dst in last.dst:
            self._last_op += 1
            last = Order(self._last_op, is_load)
            self.orders.append(last)
        last.src.append(src)
        last.dst[dst] = None
        last.names.append(name)
        self._ordered[is_load] += 1
