"""SlotTable: the worker's state of every request it computes, one row a slot, as columns.

Knows no plans' order, no epochs and no policy: it is told who takes a slot, who leaves it,
which blocks belong to it, and, at the end of a step, what was computed.

The columns are the only truth about a running request on the worker: a plan carries neither
a decode row's position nor its last token. Only the runner's thread touches them. Counters
move in `commit` alone, at the end of a step; a step that fails has moved none.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.errors import InvalidRequest, QuireError
from quire.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from quire.v1 import common_pb2 as common
from quire.v1 import step_pb2 as pb
from quire_worker.columns import Limits, PlanError, ids

# Bits in `features`: what a slot's sampling needs beyond an argmax.
RANDOM, TRUNCATE, PENALTY, BIAS, ALLOWED, MIN_TOKENS = 1, 2, 4, 8, 16, 32
EDITS = PENALTY | BIAS | ALLOWED | MIN_TOKENS


class SlotTable:
    """S = max_slots, T = max_model_len, B = blocks a slot can have."""

    def __init__(
        self, limits: Limits, device: torch.device, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.limits = limits
        self.device = device
        self.eos_token_ids = np.array(sorted(set(eos_token_ids)), np.int32)  # [num_eos]
        slots, blocks = limits.max_slots, limits.max_blocks_per_slot
        self.in_use = np.zeros(slots, bool)
        self.finished = np.zeros(slots, bool)  # sampled a stop token, or failed alone: runs no more
        # Refused at admission: samples nothing, but its prompt is computed all the same, since
        # others may share its blocks by name already.
        self.muted = np.zeros(slots, bool)
        self.num_computed_tokens = np.zeros(slots, np.int32)
        self.num_tokens = np.zeros(slots, np.int32)  # prompt and outputs so far
        self.prompt_len = np.zeros(slots, np.int32)
        # Touched lazily: a page of it costs memory when a request has tokens there.
        self.token_ids = np.zeros((slots, limits.max_model_len), np.int32)  # [S, T]
        self.num_blocks = np.zeros(slots, np.int32)
        self.block_rows = np.zeros((slots, blocks), np.int32)  # [S, B]
        # The table the kernels index by slot id. On CPU it is `block_rows` itself.
        self.block_table = torch.from_numpy(self.block_rows)
        if device.type != "cpu":
            self.block_table = self.block_table.to(device)
        self._block_writes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # sampling
        self.features = np.zeros(slots, np.uint8)
        self.temperature = np.zeros(slots, np.float32)
        self.top_p = np.ones(slots, np.float32)
        self.top_k = np.zeros(slots, np.int32)
        self.min_p = np.zeros(slots, np.float32)
        self.penalties = np.zeros((slots, 3), np.float32)  # repetition, presence, frequency
        self.seed = np.zeros(slots, np.int64)  # the 64 bits of the seed
        self.min_tokens = np.zeros(slots, np.int32)
        self.num_logprobs = np.zeros(slots, np.int32)
        self.ignore_eos = np.zeros(slots, bool)
        self.num_stop_ids = np.zeros(slots, np.int32)
        self.stop_ids = np.full((slots, MAX_STOP_TOKEN_IDS), -1, np.int32)
        # Rare features: only slots that use one have an entry.
        self.logit_bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # ids, biases
        self.allowed: dict[int, np.ndarray] = {}  # ids
        # output counts int32 [vocab], prompt mask bool [vocab], on the device
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.adapter: dict[int, str] = {}
        self.grammar: dict[int, common.Grammar] = {}  # reserved
        self.request_id: dict[int, str] = {}

    # -- who has which slot ----------------------------------------------------------------
    def admit(self, admit: pb.Admit) -> QuireError | None:
        """Put a request into a free slot.

        Raises PlanError when the message contradicts the table or the limits. An error that is
        returned is the request's own (say, a parameter this worker can't do): it has the slot
        until it is retired, muted.
        """
        slot = admit.slot
        limits = self.limits
        if slot >= limits.max_slots:
            raise PlanError(f"admit: slot {slot} is not between 0 and {limits.max_slots - 1}.")
        if self.in_use[slot]:
            raise PlanError(f"admit: slot {slot} is in use; retire it first.")
        prompt = ids(admit.prompt_token_ids, limits.vocab_size, "admit.prompt_token_ids")
        output = ids(admit.output_token_ids, limits.vocab_size, "admit.output_token_ids")
        blocks = ids(admit.block_ids, limits.num_blocks, "admit.block_ids")
        total = len(prompt) + len(output)
        if len(prompt) == 0 or total > limits.max_model_len:
            raise PlanError(
                f"admit: slot {slot} has {len(prompt)} prompt and {len(output)} output tokens; "
                f"a request has 1 to {limits.max_model_len} tokens in all."
            )
        if admit.num_computed_tokens >= total:
            raise PlanError(
                f"admit: num_computed_tokens {admit.num_computed_tokens} of slot {slot} must be "
                f"below its {total} tokens."
            )
        if len(blocks) > limits.max_blocks_per_slot:
            raise PlanError(
                f"admit: {len(blocks)} blocks for slot {slot}; "
                f"at most {limits.max_blocks_per_slot} fit."
            )
        if admit.num_computed_tokens > len(blocks) * limits.block_size:
            raise PlanError(
                f"admit: {admit.num_computed_tokens} tokens computed in {len(blocks)} blocks."
            )
        self.in_use[slot] = True
        self.finished[slot] = self.muted[slot] = False
        self.prompt_len[slot] = len(prompt)
        self.num_tokens[slot] = total
        self.num_computed_tokens[slot] = admit.num_computed_tokens
        self.token_ids[slot, : len(prompt)] = prompt
        self.token_ids[slot, len(prompt) : total] = output
        self.num_blocks[slot] = 0
        self.features[slot] = 0
        self.request_id[slot] = admit.request_id
        self.append_blocks(np.full(len(blocks), slot, np.int32), blocks)
        try:
            self._set_sampling(slot, admit, prompt, output)
        except QuireError as error:
            self.muted[slot] = True
            return error
        return None

    def _set_sampling(
        self, slot: int, admit: pb.Admit, prompt: np.ndarray, output: np.ndarray
    ) -> None:
        if admit.adapter:
            raise QuireError("unsupported", f"adapter {admit.adapter!r} is not loaded.")
        if admit.HasField("grammar") and admit.grammar.kind:
            raise QuireError("unsupported", "this worker follows no grammars.")
        vocab = self.limits.vocab_size
        params = SamplingParams.from_proto(admit.sampling_params).check(vocab)
        if params.seed is None:
            if params.temperature:
                raise InvalidRequest("seed must be set before a request is admitted.", "seed")
            params = params.seeded()
        features = 0
        if params.temperature > 0:
            features |= RANDOM
            if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
                features |= TRUNCATE
        self.temperature[slot] = params.temperature
        self.top_k[slot] = max(params.top_k, 0)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = np.uint64(params.seed or 0).astype(np.int64)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if penalties != (1.0, 0.0, 0.0):
            features |= PENALTY
            counts = np.bincount(output, minlength=vocab).astype(np.int32)
            mask = np.zeros(vocab, bool)
            mask[prompt] = True
            self.seen[slot] = (
                torch.from_numpy(counts).to(self.device),
                torch.from_numpy(mask).to(self.device),
            )
        self.penalties[slot] = penalties
        self.ignore_eos[slot] = params.ignore_eos
        stop_ids = sorted(set(params.stop_token_ids))
        self.num_stop_ids[slot] = len(stop_ids)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.min_tokens[slot] = params.min_tokens
        if params.min_tokens > len(output):
            features |= MIN_TOKENS
        if params.logit_bias:
            features |= BIAS
            bias: dict[int, float] = {}
            for token, value in params.logit_bias:
                bias[token] = bias.get(token, 0.0) + value
            self.logit_bias[slot] = (
                np.array(list(bias), np.int64),
                np.array(list(bias.values()), np.float32),
            )
        if params.allowed_token_ids:
            features |= ALLOWED
            self.allowed[slot] = np.array(sorted(set(params.allowed_token_ids)), np.int64)
        self.num_logprobs[slot] = params.logprobs or 0
        self.features[slot] = features

    def retire(self, slots: np.ndarray) -> None:
        """Free the slots; free ones stay free."""
        for slot in slots.tolist():
            self.in_use[slot] = False
            self.finished[slot] = self.muted[slot] = False
            for store in (
                self.logit_bias, self.allowed, self.seen, self.adapter, self.grammar,
                self.request_id,
            ):  # fmt: skip
                store.pop(slot, None)

    def clear(self) -> None:
        """Free every slot."""
        self.retire(np.flatnonzero(self.in_use))
        self._block_writes.clear()

    # -- blocks ----------------------------------------------------------------------------
    def append_blocks(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        """slots, blocks i32 [n]: blocks[i] becomes the next block of slots[i], in order.
        Raises PlanError for a free slot and for a full one."""
        if len(slots) == 0:
            return
        if not self.in_use[slots].all():
            free = int(slots[~self.in_use[slots]][0])
            raise PlanError(f"new_block_rows: nobody is in slot {free}.")
        columns = self.num_blocks[slots]
        if len(slots) > 1:
            columns = columns + _nth_of_its_kind(slots)
        if int(columns.max()) >= self.limits.max_blocks_per_slot:
            full = int(slots[columns.argmax()])
            raise PlanError(
                f"new_block_rows: slot {full} can't have more than "
                f"{self.limits.max_blocks_per_slot} blocks."
            )
        self.block_rows[slots, columns] = blocks
        np.add.at(self.num_blocks, slots, 1)
        if self.device.type != "cpu":
            self._block_writes.append((slots, columns, blocks))

    def flush_blocks(self) -> None:
        """Bring the device's block table up to date; before each forward. Nothing on CPU."""
        if not self._block_writes:
            return
        parts = [np.concatenate(p) for p in zip(*self._block_writes, strict=True)]
        self._block_writes.clear()
        slots, columns, blocks = torch.from_numpy(np.stack(parts)).to(self.device)
        self.block_table[slots.long(), columns.long()] = blocks

    # -- after a step ----------------------------------------------------------------------
    def commit(
        self,
        slots: np.ndarray,
        num_tokens: np.ndarray,
        sampled_slots: np.ndarray,
        tokens: np.ndarray,
    ) -> np.ndarray:
        """Count what a step has done: i32 [n] slots and tokens computed in each, i32 [m] slots
        that sampled and their tokens. Returns bool [m]: the token is EOS or a stop id."""
        self.num_computed_tokens[slots] += num_tokens
        muted = slots[self.muted[slots]]
        self.finished[muted] = self.num_computed_tokens[muted] == self.num_tokens[muted]
        if len(sampled_slots) == 0:
            return np.zeros(0, bool)
        at = self.num_tokens[sampled_slots]
        inside = at < self.limits.max_model_len  # the last token of a full context has no KV
        if inside.all():
            self.token_ids[sampled_slots, at] = tokens
        else:
            self.token_ids[sampled_slots[inside], at[inside]] = tokens[inside]
        self.num_tokens[sampled_slots] = at + 1
        stopped = (tokens[:, None] == self.eos_token_ids).any(1) & ~self.ignore_eos[sampled_slots]
        most = int(self.num_stop_ids[sampled_slots].max())
        if most:
            stopped |= (tokens[:, None] == self.stop_ids[sampled_slots, :most]).any(1)
        self.finished[sampled_slots] = stopped
        if self.seen:
            for slot, token in zip(sampled_slots.tolist(), tokens.tolist(), strict=True):
                if slot in self.seen:
                    self.seen[slot][0][token] += 1
        return stopped

    def fail(self, slot: int) -> None:
        """The slot's request failed alone: its rows run no more."""
        self.finished[slot] = True

    def num_output_tokens(self, slots: np.ndarray) -> np.ndarray:
        """i32 [n]."""
        return self.num_tokens[slots] - self.prompt_len[slots]

    def check(self) -> None:
        """Raise AssertionError when the columns contradict each other."""
        used = np.flatnonzero(self.in_use)
        assert (self.num_computed_tokens[used] <= self.num_tokens[used]).all()
        assert (self.prompt_len[used] <= self.num_tokens[used]).all()
        room = self.num_blocks[used] * self.limits.block_size
        assert (self.num_computed_tokens[used] <= room).all()
        assert not self.finished[~self.in_use].any()
        assert set(self.request_id) == set(used.tolist())
        for store in (self.logit_bias, self.allowed, self.seen):
            assert set(store) <= set(used.tolist())


def _nth_of_its_kind(values: np.ndarray) -> np.ndarray:
    """[7, 3, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    nth = np.arange(len(values)) - np.repeat(new, np.diff(np.r_[new, len(values)]))
    result = np.empty(len(values), np.int32)
    result[order] = nth
    return result
