"""The decoder against transformers, and its rows against themselves in other company."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fakes.checkpoints import ARCHITECTURES, make_checkpoint
from quire_worker.kv_cache import KVCache, KVCacheSpec
from quire_worker.layers.metadata import AttentionMetadata
from quire_worker.loader import load_model
from quire_worker.models.decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, while it is imported

BLOCK = 16
CPU = torch.device("cpu")


class Engine:
    """A model with a pool of scattered blocks; `step` runs the next tokens of several slots."""

    def __init__(self, model: Decoder, max_slots: int = 20, max_len: int = 320) -> None:
        self.model = model
        blocks_each = max_len // BLOCK
        spec = KVCacheSpec.from_config(model.config, dtype=model.dtype, block_size=BLOCK)
        self.kv_cache = KVCache(spec, max_slots * blocks_each, CPU)
        scattered = torch.randperm(
            max_slots * blocks_each, generator=torch.Generator().manual_seed(5)
        )
        self.block_table = scattered.int().view(max_slots, blocks_each)
        self.computed = [0] * max_slots

    def step(self, batch: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """slot -> its next tokens; slot -> hidden rows of those tokens."""
        ids, positions, slot_mapping, lens, starts = [], [], [], [], [0]
        for slot, tokens in batch.items():
            first = self.computed[slot]
            self.computed[slot] += len(tokens)
            for position in range(first, first + len(tokens)):
                positions.append(position)
                block = int(self.block_table[slot, position // BLOCK])
                slot_mapping.append(block * BLOCK + position % BLOCK)
            ids += tokens
            lens.append(self.computed[slot])
            starts.append(len(ids))
        attn = AttentionMetadata(
            block_table=self.block_table,
            slots=torch.tensor(list(batch), dtype=torch.int32),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            slot_mapping=torch.tensor(slot_mapping),
        )
        hidden = self.model.forward(torch.tensor(ids), torch.tensor(positions), attn, self.kv_cache)
        return {
            slot: hidden[a:b] for slot, a, b in zip(batch, starts[:-1], starts[1:], strict=True)
        }

    def greedy(self, prompt: list[int], count: int, slot: int = 3) -> list[int]:
        tokens, new = list(prompt), prompt
        for _ in range(count):
            last = self.step({slot: new})[slot][-1:]
            new = [int(self.model.compute_logits(last).argmax())]
            tokens += new
        return tokens

    def chunked(self, slot: int, tokens: list[int], sizes: list[int]) -> torch.Tensor:
        """Hidden rows of a whole sequence computed in chunks of `sizes`, the last one repeated."""
        rows, at, sizes = [], 0, list(sizes)
        while at < len(tokens):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            rows.append(self.step({slot: tokens[at : at + size]})[slot])
            at += size
        return torch.cat(rows)


def load(folder: Path, dtype: str = "auto") -> Decoder:
    return load_model(folder, device=CPU, dtype=dtype, block_size=BLOCK)


def some_tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (count,), generator=generator).tolist()


def oracle(folder: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on shared cores are fastest so; tests of thread counts set their own."""
    with threads(1):
        yield


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, arch: str) -> None:
    folder = make_checkpoint(tmp_path, arch, sharded=arch == "qwen2")
    prompt = some_tokens(20)
    expected = oracle(folder).generate(
        torch.tensor([prompt]), max_new_tokens=210, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()  # fmt: skip
    found = Engine(load(folder)).greedy(prompt, 210)
    assert len(set(found[20:])) > 40, "a constant loop would prove little"
    assert found == expected


ROPES = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "partial bias": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("variant", ROPES)
def test_logits_equal_those_of_transformers_for_variants(tmp_path: Path, variant: str) -> None:
    folder = make_checkpoint(tmp_path, "llama", **ROPES[variant])
    tokens = some_tokens(256)
    with torch.no_grad():
        expected = oracle(folder)(torch.tensor([tokens])).logits[0]
    model = load(folder)
    found = model.compute_logits(Engine(model).step({2: tokens})[2])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_qwen_windows_only_the_layers_it_names(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    folder = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=3, **window)
    tokens = some_tokens(100)
    with torch.no_grad():
        expected = oracle(folder)(torch.tensor([tokens])).logits[0]
    model = load(folder)
    assert model.config.layer_windows == (0, 24, 24)
    found = model.compute_logits(Engine(model).step({2: tokens})[2])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["qwen3", "mistral"])
def test_a_row_has_the_same_bits_in_any_chunking_and_company(
    tmp_path: Path, arch: str, dtype: str
) -> None:
    model = load(make_checkpoint(tmp_path, arch, dtype=dtype))
    tokens = some_tokens(150)
    with threads(1):
        expected = Engine(model).chunked(0, tokens, [150])
        expected_logits = model.compute_logits(expected)
    for count in (1, 2):
        with threads(count):
            for sizes in ([1], [7], [64], [33, 2, 1, 100, 1]):
                found = Engine(model).chunked(4, tokens, sizes)
                assert torch.equal(found, expected), (count, sizes)
            engine, rows = Engine(model), []
            for at in range(0, 150, 10):  # neighbours prefill, decode, come and go
                batch = {1: some_tokens(1 + at % 40, at), 0: tokens[at : at + 10]}
                if at % 20:
                    batch[7] = some_tokens(3, at)
                if at > 100:
                    batch = {9: some_tokens(70, at)} | batch
                rows.append(engine.step(batch)[0])
            assert torch.equal(torch.cat(rows), expected), count
            for n in (1, 2, 3, 5, 8, 16, 31):
                assert torch.equal(model.compute_logits(expected[:n]), expected_logits[:n])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_row_has_the_same_bits_at_every_batch_size(tmp_path: Path, dtype: str) -> None:
    model = load(make_checkpoint(tmp_path, "llama", dtype=dtype))
    prompts = {slot: some_tokens(5 + 9 * slot, slot) for slot in range(16)}

    def last_row(size: int) -> torch.Tensor:
        engine = Engine(model, max_slots=16)
        engine.step({slot: prompts[slot] for slot in range(size)})
        return engine.step({slot: [slot + 1] for slot in reversed(range(size))})[0]

    with threads(1):
        expected = last_row(1)
    for count in (1, 2):
        with threads(count):
            for size in range(1, 17):
                assert torch.equal(last_row(size), expected), (count, size)


def test_sharded_and_single_checkpoints_give_the_same_bits(tmp_path: Path) -> None:
    one = load(make_checkpoint(tmp_path / "one", "qwen2"))
    two = load(make_checkpoint(tmp_path / "two", "qwen2", sharded=True))
    tokens = some_tokens(30)
    assert torch.equal(Engine(one).step({0: tokens})[0], Engine(two).step({0: tokens})[0])
    assert one.num_parameters == two.num_parameters


def test_two_requests_may_share_a_block_written_in_the_same_step(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama"))
    tokens = some_tokens(40)
    engine = Engine(model)
    alone = engine.step({0: tokens})[0]
    engine = Engine(model)
    engine.block_table[5, :2] = engine.block_table[0, :2]
    engine.computed[5] = 32
    both = engine.step({5: tokens[32:], 0: tokens})
    assert torch.equal(both[0], alone)
    assert torch.equal(both[5], alone[32:])


def test_padding_tokens_are_computed_but_written_nowhere(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama"))
    engine = Engine(model)
    expected = engine.step({0: some_tokens(5)})[0]
    engine = Engine(model)
    before = engine.kv_cache.pool.clone()
    mapping = engine.block_table[0, 0].long() * BLOCK + torch.arange(5)
    attn = AttentionMetadata(
        block_table=engine.block_table,
        slots=torch.tensor([0, 1], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 5, 5], dtype=torch.int32),
        seq_lens=torch.tensor([5, 0], dtype=torch.int32),
        slot_mapping=torch.cat((mapping, torch.full((3,), -1))),
    )
    ids = torch.tensor(some_tokens(5) + [0, 0, 0])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 0, 0])
    found = model.forward(ids, positions, attn, engine.kv_cache)
    assert torch.equal(found[:5], expected)
    changed = (engine.kv_cache.pool != before).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [int(engine.block_table[0, 0])]


def test_the_proof_is_named_for_the_fingerprint(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama", dtype="bfloat16"))
    assert model.numerics.startswith("cpu-")
    assert "bfloat16" in model.numerics
    assert not model.numerics.endswith("unproven")
