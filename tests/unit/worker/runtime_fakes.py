"""A model whose logits are a hash of what it reads from paged KV, and plans made by hand.

Knows no real checkpoint. A wrong position, block or last token changes every later token.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import torch

from quire.sampling import SamplingParams
from quire.v1 import step_pb2 as pb
from quire_worker.columns import Limits
from quire_worker.runner import Runner

VOCAB, EOS = 97, 96
SAMPLE, LOGPROBS = pb.ROW_FLAG_SAMPLE, pb.ROW_FLAG_LOGPROBS


def i32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def context_logits(tokens: list[int]) -> np.ndarray:
    """f32 [VOCAB] that depend on every token and its place."""
    seed = zlib.crc32(np.array(tokens, "<i4").tobytes())
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


class HashModel:
    """Keeps token ids as KV. `breaks` maps a token to what goes wrong when it is computed last:
    'nan' for its row's logits, 'raise' for the whole step."""

    def __init__(self) -> None:
        self.breaks: dict[int, str] = {}
        self.steps: list[int] = []  # tokens of each forward

    def forward(self, input_ids, positions, attn, kv_cache):
        self.steps.append(len(input_ids))
        pool = kv_cache.pool.view(-1)
        pool[attn.slot_mapping] = input_ids
        block_size = kv_cache.pool.shape[1]
        rows = []
        for row, slot in enumerate(attn.slots.tolist()):
            begin, end = attn.query_start_loc[row : row + 2].tolist()
            length = int(attn.seq_lens[row])
            assert positions[begin:end].tolist() == list(range(length - (end - begin), length))
            at = torch.arange(length)
            blocks = attn.block_table[slot][at // block_size].long()
            context = pool[blocks * block_size + at % block_size].tolist()
            rows += [context_logits(context[: p + 1]) for p in positions[begin:end].tolist()]
        for token in input_ids.tolist():
            if self.breaks.get(token) == "raise":
                raise RuntimeError("the device is on fire")
        hidden = torch.from_numpy(np.stack(rows))
        for row, token in enumerate(input_ids.tolist()):
            if self.breaks.get(token) == "nan":
                hidden[row, 3] = float("nan")
        return hidden

    def compute_logits(self, hidden):
        return hidden.clone()


def make_runner(
    block_size: int = 4, num_blocks: int = 64, max_slots: int = 16, **options
) -> Runner:
    limits = Limits(
        max_slots, num_blocks, block_size, options.pop("max_model_len", 64), VOCAB,
        options.pop("num_host_blocks", 0),
    )  # fmt: skip
    cache = SimpleNamespace(pool=torch.zeros(num_blocks, block_size, dtype=torch.int32))
    model = options.pop("model", None) or HashModel()
    return Runner(model, cache, limits, torch.device("cpu"), (EOS,), 7, **options)


class Planner:
    """Makes plans: admits requests, gives them blocks, runs rows; keeps the outputs."""

    def __init__(self, runner: Runner, epoch: int = 1) -> None:
        self.runner = runner
        self.epoch, self.seq = epoch, 0
        self.free = list(range(runner.limits.num_blocks))
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.totals: dict[int, int] = {}
        self.finished: set[int] = set()
        self.logprobs: dict[int, list[list[tuple[int, float]]]] = {}
        self.ranks: dict[int, list[int]] = {}
        self.errors: dict[int, str] = {}

    def admit(self, slot, prompt, params=None, output=(), computed=0, blocks=(), **fields):
        """An Admit message, and the slot's bookkeeping."""
        params = params or SamplingParams(temperature=0)
        self.computed[slot] = computed
        self.blocks[slot] = list(blocks)
        self.totals[slot] = len(prompt) + len(output)
        self.outputs[slot] = []
        self.logprobs[slot], self.ranks[slot] = [], []
        return pb.Admit(
            slot=slot, request_id=f"r{slot}", prompt_token_ids=i32(*prompt),
            output_token_ids=i32(*output), num_computed_tokens=computed, block_ids=i32(*blocks),
            sampling_params=params.seeded().to_proto(), **fields,
        )  # fmt: skip

    def plan(self, rows=None, admit=(), retire=(), logprobs=False, **columns) -> pb.StepPlan:
        """rows: {slot: tokens}; the last token of a slot's known ones samples."""
        self.seq += 1
        slots, nums, flags, new_rows, new_ids = [], [], [], [], []
        for slot, count in (rows or {}).items():
            end = self.computed[slot] + count
            while len(self.blocks[slot]) * self.runner.limits.block_size < end:
                block = self.free.pop(0)
                self.blocks[slot].append(block)
                new_rows.append(slot)
                new_ids.append(block)
            self.computed[slot] = end
            samples = end == self.totals[slot]
            self.totals[slot] += samples
            slots.append(slot)
            nums.append(count)
            flags.append((SAMPLE | (LOGPROBS if logprobs else 0)) if samples else 0)
        fields = {
            "slots": i32(*slots), "num_tokens": i32(*nums), "flags": bytes(flags),
            "new_block_rows": i32(*new_rows), "new_block_ids": i32(*new_ids),
            "retired_slots": i32(*retire), "admit": admit, **columns,
        }  # fmt: skip
        return pb.StepPlan(epoch=self.epoch, seq=self.seq, **fields)

    def run(self, rows=None, **options) -> pb.StepResult:
        """Plan, execute, expect success, keep the outputs."""
        result = self.runner.execute(self.plan(rows, **options))
        assert result.status == pb.STEP_STATUS_OK, result.error
        self.read(result)
        self.runner.table.check()
        return result

    def read(self, result: pb.StepResult) -> None:
        tokens = np.frombuffer(result.token_ids, "<i4").tolist()
        counts = np.frombuffer(result.logprobs.counts, "<u4").tolist()
        ids = np.frombuffer(result.logprobs.token_ids, "<i4").tolist()
        values = np.frombuffer(result.logprobs.logprobs, "<f4").tolist()
        ranks = np.frombuffer(result.logprobs.ranks, "<u4").tolist()
        slots = np.frombuffer(result.slots, "<i4").tolist()
        columns = zip(slots, result.num_outputs, result.finished, strict=True)
        for slot, n, finished in columns:
            if n:
                self.outputs[slot].append(tokens.pop(0))
            if n and counts:
                n_entries = counts.pop(0)
                self.logprobs[slot].append(
                    list(zip(ids[:n_entries], values[:n_entries], strict=True))
                )
                self.ranks[slot].append(ranks.pop(0))
                del ids[:n_entries], values[:n_entries]
            if finished:
                self.finished.add(slot)
        assert not tokens
        for row in result.row_errors:
            self.errors[row.slot] = row.error.name

    def generate(self, slot, prompt, params=None, n=8, chunk=64, logprobs=False, **options):
        """Run one request alone to n tokens or its end; its outputs."""
        admit = [self.admit(slot, prompt, params, **options)]
        while len(self.outputs[slot]) < n and slot not in self.finished:
            count = min(chunk, self.totals[slot] - self.computed[slot])
            self.run({slot: count}, admit=admit, logprobs=logprobs)
            admit = []
            if slot in self.errors:
                break
        return self.outputs[slot]


def reference_greedy(prompt: list[int], n: int, stops: tuple[int, ...] = (EOS,)) -> list[int]:
    """The plain loop: no blocks, no batch."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n:
        tokens.append(int(context_logits(tokens).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]
