"""What a simulated worker keeps of each running request: counts by slot, its blocks, its state.

Knows no memory and no plan as a whole; what an admission says is checked here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.v1 import step_pb2 as pb
from quire_worker.columns import Limits, ids
from quire_worker.simulated import tokens as hashing
from quire_worker.simulated.memory import Violation


@dataclass(slots=True)
class Slot:
    """One request: what does not change while it runs."""

    request_id: str
    tokens: np.ndarray  # i32 [num_forced] prompt and delivered output
    states: np.ndarray  # u64 [num_forced] after each of them
    stop_ids: frozenset[int]
    logprobs: int | None


class Slots:
    """Columns are [max_slots]; the block table is touched as far as it is used."""

    def __init__(self, limits: Limits) -> None:
        n = limits.max_slots
        self.limits = limits
        self.in_use = np.zeros(n, bool)
        self.finished = np.zeros(n, bool)  # the rest of its rows is skipped
        self.num_tokens = np.zeros(n, np.int32)
        self.num_computed = np.zeros(n, np.int32)
        self.state = np.zeros(n, np.uint64)  # after all tokens
        self.key = np.zeros(n, np.uint64)  # of its seed
        self.ends_at_eos = np.zeros(n, bool)
        self.has_stop_ids = np.zeros(n, bool)
        self.num_blocks = np.zeros(n, np.int32)
        self.table = np.zeros((n, limits.max_blocks_per_slot), np.int32)
        self.by_slot: dict[int, Slot] = {}

    def clear(self) -> None:
        self.in_use[:] = False
        self.by_slot.clear()

    def blocks(self, slot: int) -> np.ndarray:
        """i32 [num_blocks] of the slot's table."""
        return self.table[slot, : self.num_blocks[slot]]

    def retire(self, slot: int) -> None:
        if not self.in_use[slot]:
            raise Violation(f"retired slot {slot} is free")
        self.in_use[slot] = False
        del self.by_slot[slot]

    def admit(self, admit: pb.Admit) -> int:
        """Take a request in; how many of its tokens are computed already."""
        limits, slot = self.limits, admit.slot
        if slot >= limits.max_slots or self.in_use[slot]:
            raise Violation(f"slot {slot} is not free")
        prompt = ids(admit.prompt_token_ids, limits.vocab_size, "prompt_token_ids")
        output = ids(admit.output_token_ids, limits.vocab_size, "output_token_ids")
        tokens = np.concatenate((prompt, output))
        blocks = ids(admit.block_ids, limits.num_blocks, "block_ids")
        computed = admit.num_computed_tokens
        if not len(prompt) or not computed < len(tokens) <= limits.max_model_len:
            raise Violation(f"an admission with {computed} of {len(tokens)} tokens computed")
        if not -(-computed // limits.block_size) <= len(blocks) <= limits.max_blocks_per_slot:
            raise Violation(f"a table of {len(blocks)} blocks for {computed} tokens computed")
        params = admit.sampling_params
        if not params.HasField("seed"):
            raise Violation("an admission has no seed")
        states = hashing.prefix_states(tokens)
        self.in_use[slot], self.finished[slot] = True, False
        self.num_tokens[slot], self.num_computed[slot] = len(tokens), computed
        self.state[slot] = states[-1]
        self.key[slot] = hashing.seed_keys(np.array([params.seed & hashing.SEED_MASK]))[0]
        self.ends_at_eos[slot] = not params.ignore_eos
        self.has_stop_ids[slot] = bool(params.stop_token_ids)
        self.num_blocks[slot] = len(blocks)
        self.table[slot, : len(blocks)] = blocks
        self.by_slot[slot] = Slot(
            admit.request_id,
            tokens,
            states,
            frozenset(params.stop_token_ids),
            params.logprobs if params.HasField("logprobs") else None,
        )
        return computed

    def append_blocks(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        """Blocks [n] to the tables of slots [n], in order."""
        for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True):
            at = int(self.num_blocks[slot])
            if not self.in_use[slot]:
                raise Violation(f"a block for free slot {slot}")
            if at >= self.limits.max_blocks_per_slot:
                raise Violation(f"slot {slot} has blocks beyond its context")
            self.table[slot, at] = block
            self.num_blocks[slot] = at + 1

    def append_tokens(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """One sampled token for each of the slots [n]."""
        self.state[slots] += hashing.term(tokens, self.num_tokens[slots])
        self.num_tokens[slots] += 1

    def stops(self, slots: np.ndarray, tokens: np.ndarray, eos: int) -> np.ndarray:
        """bool [n]: the token is EOS or a stop id of its request."""
        stopped = (tokens == eos) & self.ends_at_eos[slots]
        for i in np.flatnonzero(self.has_stop_ids[slots]).tolist():
            stopped[i] |= int(tokens[i]) in self.by_slot[int(slots[i])].stop_ids
        return np.asarray(stopped)
