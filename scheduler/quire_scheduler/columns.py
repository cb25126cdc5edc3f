"""The running requests as columns: one row (slot) per request, numpy arrays by slot.

Knows no policy, no blocks and no wire; for a request that has a slot these arrays are the only
truth about its counts.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quire_scheduler.kv.tables import lazy_matrix

if TYPE_CHECKING:
    from quire_scheduler.kv import KVHandle
    from quire_scheduler.request import Request

I32 = NDArray[np.int32]
Slots = NDArray[np.intp]  # what numpy indexes with fastest
Bool = NDArray[np.bool_]


class Columns:
    """Struct of arrays, all [max_slots]. Written by the engine thread only.

    A slot is free, attached (it has a request) or retiring (given up, but plans that name it, or
    the plan that retires it, are not acknowledged yet). A preempted request stays attached while
    tokens of it are in flight; it is not running.
    """

    def __init__(self, max_slots: int, max_model_len: int, block_size: int) -> None:
        def column() -> I32:
            return np.zeros(max_slots, np.int32)

        self.max_slots = max_slots
        self.max_model_len = max_model_len
        self.block_size = block_size
        blocks = -(-max_model_len // block_size)
        self._token_ids: I32 = lazy_matrix(max_slots, blocks * block_size)
        self._blocks_shape = (max_slots, blocks, block_size)
        self._first_token = np.arange(max_slots) * (blocks * block_size)  # in the flat matrix
        self._appended: list[tuple[NDArray[np.intp], I32]] = []  # (where, tokens) to be stored
        self.num_tokens = column()  # known: prompt + confirmed outputs
        self.num_prompt_tokens = column()
        self.num_forced = column()  # known at admission; the rest was sampled in this slot
        self.num_computed_tokens = column()  # by all plans sent so far
        self.num_expected = column()  # known when all plans in flight are done
        self.max_total = column()  # at this many tokens it ends by length
        self.num_cached_tokens = column()  # hit at first admission
        self.priority = column()  # lower is kept longer
        self.arrival: NDArray[np.int64] = np.zeros(max_slots, np.int64)
        self.last_seq: NDArray[np.int64] = np.zeros(max_slots, np.int64)  # last plan with a row
        self.flags: NDArray[np.uint8] = np.zeros(max_slots, np.uint8)  # RowFlag of a sampling row
        self.attached: Bool = np.zeros(max_slots, np.bool_)
        self.running: Bool = np.zeros(max_slots, np.bool_)
        self.started: NDArray[np.int64] = np.zeros(max_slots, np.int64)  # order of admission
        self.client = column()  # number of the client its outputs go to
        self.handle: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.attempt: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.deaths: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.requests: list[Request | None] = [None] * max_slots
        self.kv: list[KVHandle | None] = [None] * max_slots
        self._free = list(range(max_slots))  # a heap: the lowest first, so that slots stay dense
        self.top = 0  # attached slots are below; what is done to all of them stops here

    @property
    def size(self) -> tuple[int, int, int]:
        """What it was made for: (max_slots, max_model_len, block_size)."""
        return self.max_slots, self.max_model_len, self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def next_free(self) -> int:
        """The slot that the next attach() takes."""
        return self._free[0]

    @property
    def free(self) -> list[int]:
        """Free slots, in no order."""
        return list(self._free)

    def give_back(self, slots: I32) -> None:
        """Retired slots [n] are free."""
        for slot in slots.tolist():
            heapq.heappush(self._free, slot)

    def clear(self) -> None:
        """A new epoch: all slots are free, nothing is in flight."""
        self.last_seq[:] = 0
        self._free = list(range(self.max_slots))
        self.top = 0

    @property
    def wanted(self) -> I32:
        """Tokens each slot could compute now: [top]. 1 for a decoding request."""
        wanted: I32 = self.num_expected[: self.top] - self.num_computed_tokens[: self.top]
        return wanted

    @property
    def token_ids(self) -> I32:
        """Known tokens: [max_slots, max_model_len, rounded up to blocks], num_tokens in each."""
        if self._appended:
            flat = self._token_ids.reshape(-1)
            for where, token_ids in self._appended:
                flat[where] = token_ids
            self._appended.clear()
        return self._token_ids

    @property
    def token_blocks(self) -> I32:
        """The same memory as [max_slots, num_blocks, block_size]."""
        return self.token_ids.reshape(self._blocks_shape)

    def append_tokens(self, slots: Slots, at: I32, token_ids: I32, num_tokens: I32) -> None:
        """One confirmed token for each of distinct slots [n], at index `at` [n] = num_tokens - 1;
        then they have num_tokens [n]. They are stored when somebody looks: each is a cache miss,
        and the next plan does not depend on them."""
        self._appended.append((self._first_token[slots] + at, token_ids))
        self.num_tokens[slots] = num_tokens

    def attach(self, request: Request, kv: KVHandle, num_cached: int) -> int:
        """The request moves into the next free slot, which is its row of the block tables:
        from here on the columns are the truth about it. Returns the slot."""
        slot = heapq.heappop(self._free)
        assert slot == kv.row
        self.top = max(self.top, slot + 1)
        n = len(request.tokens)
        self.token_ids[slot, :n] = request.tokens
        self.num_tokens[slot] = n
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        self.num_forced[slot] = n
        self.num_computed_tokens[slot] = num_cached
        self.num_expected[slot] = n
        self.max_total[slot] = request.max_total
        self.num_cached_tokens[slot] = request.num_cached_tokens
        self.priority[slot] = request.priority
        self.arrival[slot] = request.arrival
        self.flags[slot] = request.row_flags
        self.client[slot] = request.client
        self.handle[slot] = request.handle
        self.attempt[slot] = request.attempt
        self.deaths[slot] = request.deaths
        self.attached[slot] = True
        self.requests[slot] = request
        self.kv[slot] = kv
        request.num_hit = num_cached
        request.slot = slot
        request.columns = self
        return slot

    def detach(self, request: Request, *, keep_tokens: bool) -> None:
        """The request leaves its slot, with its tokens if it is to run again."""
        slot = request.slot
        if keep_tokens:
            request.tokens = self.token_ids[slot, : self.num_tokens[slot]].copy()
        else:
            request.num_final_tokens = int(self.num_tokens[slot])
        self.attached[slot] = False
        while self.top and not self.attached[self.top - 1]:
            self.top -= 1
        self.requests[slot] = None
        self.kv[slot] = None
        request.slot = -1
        request.columns = None
