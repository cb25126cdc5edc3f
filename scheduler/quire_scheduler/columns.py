"""The running requests as columns: one row (slot) per request, numpy arrays by slot.

Knows no policy, no blocks and no wire; for a request that has a slot these arrays are the only
truth about its counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quire_scheduler.kv import KVHandle
    from quire_scheduler.request import Request

I32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


class Columns:
    """Struct of arrays, all [max_slots]. Written by the engine thread only.

    A slot is free, attached (it has a request) or retiring (given up, but plans that name it, or
    the plan that retires it, are not acknowledged yet). A preempted request stays attached while
    tokens of it are in flight.
    """

    def __init__(self, max_slots: int, max_model_len: int) -> None:
        def column() -> I32:
            return np.zeros(max_slots, np.int32)

        self.max_slots = max_slots
        self.max_model_len = max_model_len
        # np.zeros touches no page before it is written
        self.token_ids: I32 = np.zeros((max_slots, max_model_len), np.int32)
        self.num_tokens = column()  # known: prompt + confirmed outputs
        self.num_prompt_tokens = column()
        self.num_forced = column()  # known at admission; the rest was sampled in this slot
        self.num_computed_tokens = column()  # by all plans sent so far
        self.num_pending = column()  # outputs that plans in flight will yield
        self.num_in_flight = column()  # plans in flight that have a row of this slot
        self.max_total = column()  # at this many tokens it ends by length
        self.num_blocks = column()
        self.num_published = column()  # leading blocks offered to the prefix cache
        self.num_cached_tokens = column()  # hit at first admission
        self.priority = column()  # lower is kept longer
        self.arrival: NDArray[np.int64] = np.zeros(max_slots, np.int64)
        self.last_seq: NDArray[np.int64] = np.zeros(max_slots, np.int64)  # last plan with a row
        self.flags: NDArray[np.uint8] = np.zeros(max_slots, np.uint8)  # RowFlag of a sampling row
        self.attached: Bool = np.zeros(max_slots, np.bool_)
        self.client = column()  # number of the client its outputs go to
        self.handle: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.attempt: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.deaths: NDArray[np.uint32] = np.zeros(max_slots, np.uint32)
        self.requests: list[Request | None] = [None] * max_slots
        self.kv: list[KVHandle | None] = [None] * max_slots
        self.free = list(range(max_slots - 1, -1, -1))

    @property
    def wanted(self) -> I32:
        """Tokens each slot could compute now: [max_slots]. 1 for a decoding request."""
        wanted: I32 = self.num_tokens + self.num_pending - self.num_computed_tokens
        return wanted

    def attach(self, request: Request, slot: int, kv: KVHandle, num_cached: int) -> None:
        """The request moves into the slot: from here on the columns are the truth about it."""
        n = len(request.tokens)
        self.token_ids[slot, :n] = request.tokens
        self.num_tokens[slot] = n
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        self.num_forced[slot] = n
        self.num_computed_tokens[slot] = num_cached
        self.num_pending[slot] = 0
        self.num_in_flight[slot] = 0
        self.max_total[slot] = request.max_total
        self.num_blocks[slot] = kv.num_blocks
        self.num_published[slot] = kv.num_published
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
        request.slot = slot
        request.columns = self

    def detach(self, request: Request, *, keep_tokens: bool) -> None:
        """The request leaves its slot, with its tokens if it is to run again."""
        slot = request.slot
        if keep_tokens:
            request.tokens = self.token_ids[slot, : self.num_tokens[slot]].copy()
        else:
            request.num_final_tokens = int(self.num_tokens[slot])
        self.attached[slot] = False
        self.requests[slot] = None
        self.kv[slot] = None
        request.slot = -1
        request.columns = None
