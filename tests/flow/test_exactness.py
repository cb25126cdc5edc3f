"""Greedy text equals transformers', and no circumstance changes a request's bits."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
import torch

from fakes.checkpoints import make_checkpoint
from quire import LLM, EngineConfig, LLMEngine, SamplingParams

pytestmark = pytest.mark.timeout(600)
NUM_TOKENS = 200
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 47, 64, 70, 90)
ARCHITECTURES = ("llama", "llama-mha", "qwen2", "qwen3", "mistral")
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def prompts(vocab_size: int) -> list[dict[str, list[int]]]:
    """16 prompts of mixed lengths; some share a prefix of two blocks."""
    shared = [(7 * i + 11) % vocab_size for i in range(40)]
    rows = []
    for row, length in enumerate(LENGTHS):
        own = [(31 * row + 17 * i + 5) % vocab_size for i in range(length)]
        rows.append({"prompt_token_ids": (shared + own)[:length] if row % 3 else own})
    return rows


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """transformers' greedy tokens, all prompts in one left-padded batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    rows = [prompt["prompt_token_ids"] for prompt in prompts(model.config.vocab_size)]
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0
    )
    return out[:, width:].tolist()


def engine(checkpoint: Path, **settings: object) -> LLM:
    values = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20} | settings
    return LLM(str(checkpoint), **values)


def tokens(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_alone_then_in_a_batch_with_cache_hits(checkpoint: Path, expected: list[list[int]]) -> None:
    with engine(checkpoint) as llm:
        rows = prompts(llm.vocab_size)
        alone = [tokens(llm.generate([row], GREEDY))[0] for row in rows]
        assert alone == expected
        again = llm.generate(rows, GREEDY)
        assert tokens(again) == expected
        assert sum(output.num_cached_tokens for output in again) > 0
        llm.check()


@pytest.mark.parametrize("budget", [16, 48, 512])
def test_chunked_prefill(checkpoint: Path, expected: list[list[int]], budget: int) -> None:
    with engine(checkpoint, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
        assert tokens(llm.generate(prompts(llm.vocab_size), GREEDY)) == expected
        llm.check()


def test_after_forced_preemption(checkpoint: Path, expected: list[list[int]]) -> None:
    with engine(checkpoint, num_gpu_blocks_override=48, max_num_seqs=16) as llm:
        assert tokens(llm.generate(prompts(llm.vocab_size), GREEDY)) == expected
        assert llm.get_stats().scheduler.num_preemptions > 0
        llm.check()


async def test_arriving_at_different_times(checkpoint: Path, expected: list[list[int]]) -> None:
    config = EngineConfig(model=str(checkpoint), dtype="float32", kv_cache_memory_bytes=64 << 20)
    async with LLMEngine(config) as llm:
        gates = [asyncio.Event() for _ in LENGTHS]

        async def one(row: int) -> list[int]:
            await gates[row].wait()
            final: list[int] = []
            async for output in llm.generate_stream(prompts(llm.vocab_size)[row], GREEDY):
                final = list(output.outputs[0].token_ids)
                if len(final) >= 7 and row + 1 < len(gates):
                    gates[row + 1].set()  # the next one comes in while this one runs
            return final

        gates[0].set()
        assert await asyncio.gather(*(one(row) for row in range(len(LENGTHS)))) == expected


SAMPLED = SamplingParams(temperature=1.0, seed=1234, max_tokens=48, ignore_eos=True, logprobs=3)
GREEDY_LOGPROBS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=3)


def bits(output: object) -> tuple[list[int], list[dict[int, float]]]:
    """Tokens and logprobs of the first choice, as exact values."""
    choice = output.outputs[0]  # type: ignore[attr-defined]
    return (
        list(choice.token_ids),
        [{token: entry.logprob for token, entry in row.items()} for row in choice.logprobs],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", [GREEDY_LOGPROBS, SAMPLED], ids=["greedy", "seeded"])
def test_same_bits_in_every_circumstance(
    tmp_path: Path, dtype: str, params: SamplingParams
) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", dtype=dtype)
    settings = {"dtype": dtype, "kv_cache_memory_bytes": 64 << 20}
    with LLM(str(folder), **settings) as llm:
        rows = prompts(llm.vocab_size)
        reference = [bits(llm.generate([row], params)[0]) for row in rows]
        assert [bits(o) for o in llm.generate([rows[-1]], params)] == [reference[-1]]  # cache hit
        for size in range(1, len(rows) + 1):  # every batch size from 1 to 16
            batch = [bits(output) for output in llm.generate(rows[:size], params)]
            assert batch == reference[:size], f"batch of {size}"
    variants = itertools.product([1, 2], [16, 100])
    for threads, budget in variants:
        with LLM(
            str(folder), num_threads=threads, max_num_batched_tokens=budget, **settings
        ) as llm:
            assert [bits(o) for o in llm.generate(rows, params)] == reference, (threads, budget)
    with LLM(str(folder), num_gpu_blocks_override=32, max_num_seqs=16, **settings) as llm:
        assert [bits(o) for o in llm.generate(rows, params)] == reference
        assert llm.get_stats().scheduler.num_preemptions > 0
        llm.check()
