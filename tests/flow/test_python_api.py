"""`from quire import LLM, LLMEngine`: vLLM's names, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fakes.checkpoints import make_checkpoint
from flow.processes import until
from quire import LLM, EngineConfig, LLMEngine, QuireError, SamplingParams


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", kv_cache_memory_bytes="64MiB") as llm:
        yield llm


def test_generate_gives_one_output_a_prompt_in_order(llm: LLM) -> None:
    prompts = ["Once upon a time", "One day a fox"]
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        choice = output.outputs[0]
        assert output.finished and choice.text == output.text
        assert len(choice.token_ids) <= 12 and choice.finish_reason in ("stop", "length")
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt)


def test_chat_ends_by_itself(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=400))
    assert output.outputs[0].finish_reason == "stop" and output.text.strip()


def test_n_choices_are_independent_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    first, second = (llm.generate("Once upon a time", params)[0] for _ in range(2))
    texts = [choice.text for choice in first.outputs]
    assert len(set(texts)) == 3 and texts == [choice.text for choice in second.outputs]
    alone = llm.generate("Once upon a time", SamplingParams(temperature=1.0, seed=5, max_tokens=12))
    assert alone[0].text == texts[0]  # choice 0 has the seed itself


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))[0].text
    word = whole.split()[5]
    (output,) = llm.generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=40, stop=[word])
    )
    assert output.text == whole[: whole.index(word)]
    assert output.outputs[0].stop_reason == word


def test_bad_prompts_and_settings_are_named(llm: LLM) -> None:
    with pytest.raises(QuireError, match="temperature"):
        llm.generate("x", SamplingParams(temperature=-1))
    with pytest.raises(QuireError, match="vocabulary"):
        llm.generate([[10**6]])
    with pytest.raises(QuireError, match="context"):
        llm.generate([list(range(200)) * 50])
    with pytest.raises(QuireError, match="max_num_seqs"):
        LLM("demo", max_num_seq=3)
    assert llm.generate("x", SamplingParams(max_tokens=1))[0].finished  # and it goes on


def test_more_prompts_than_any_queue_would_hold_are_all_answered() -> None:
    with LLM("demo", max_num_seqs=2, max_waiting=0, kv_cache_memory_bytes="16MiB") as llm:
        outputs = llm.generate([[n] for n in range(40)], SamplingParams(n=2, max_tokens=2))
        assert all(output.finished and len(output.outputs) == 2 for output in outputs)
        assert len(llm.embed([[n] for n in range(40)])) == 40
        llm.check()


def test_embeddings_equal_transformers_last_hidden_state(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = make_checkpoint(tmp_path / "model", "qwen3")
    prompts = [[1, 2, 3], list(range(50)), [7]]
    with LLM(folder, dtype="float32", kv_cache_memory_bytes="16MiB") as llm:
        outputs = llm.embed([{"prompt_token_ids": p} for p in prompts])
        mixed = llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=4))
        llm.check()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        hidden = model(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(hidden, dim=-1)
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-5)
    assert len(mixed[0].outputs[0].token_ids) == 4


async def test_streams_stats_and_health() -> None:
    config = EngineConfig(model="demo", kv_cache_memory_bytes=64 << 20)
    async with LLMEngine(config) as engine:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        texts = []
        async for output in engine.generate_stream("Once upon a time", params):
            texts.append(output.text)
            if len(texts) == 1:
                assert engine.get_stats().scheduler.running_sequences == 1
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
        (whole,) = await engine.generate(["Once upon a time"], params)
        assert whole.text == texts[-1]
        assert engine.health_check().is_healthy
        async for _ in engine.generate_stream("x", SamplingParams(max_tokens=2000)):
            break  # leaving early cancels
        await asyncio.to_thread(until, lambda: not engine.get_stats().memory.utilization, 10)
        stats = engine.get_stats()
        assert stats.scheduler.waiting_sequences == 0 and stats.scheduler.preemption_rate() == 0
        engine.check()
