"""The real model with a small KV pool and a host tier: the tokens of a pool that holds it all."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams

pytestmark = pytest.mark.timeout(300)
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
Prompt = dict[str, list[int]]


def engine(**settings: object) -> LLM:
    """The demo model in float32, whose blocks cost more to compute than to copy."""
    return LLM("demo", dtype="float32", max_model_len=512, max_num_seqs=4, **settings)


def generate(llm: LLM, prompts: list[Prompt], params: SamplingParams = PARAMS) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def conversations(llm: LLM, num_turns: int = 3) -> tuple[list[list[int]], int]:
    """Four talks with a turn each in turn, so that every turn finds the others' blocks in its
    way: (tokens of all turns, prompt tokens that were cached)."""
    tokens: list[list[int]] = []
    cached = 0
    talks = [[(97 * talk + 13 * i) % 2000 + 5 for i in range(150)] for talk in range(4)]
    for _ in range(num_turns):
        for talk in talks:
            (output,) = llm.generate([{"prompt_token_ids": talk}], PARAMS)
            tokens.append(list(output.outputs[0].token_ids))
            cached += output.num_cached_tokens
            talk += [*tokens[-1], 7, 8, 9]
    return tokens, cached


def test_turns_of_many_talks_come_back_from_the_host() -> None:
    with engine(num_gpu_blocks_override=1000) as llm:
        expected, cached_in_a_big_pool = conversations(llm)
    with engine(num_gpu_blocks_override=34, host_cache_memory=256 << 20) as llm:
        tokens, cached = conversations(llm)
        assert tokens == expected
        stats = llm._text.local.engine.stats()
        assert stats.loaded_blocks > 0 and stats.host_hit_tokens > 0
        assert stats.offloaded_blocks >= stats.loaded_blocks // 3
        assert cached >= cached_in_a_big_pool * 3 // 4
        llm.check()
    with engine(num_gpu_blocks_override=34) as llm:
        tokens, without = conversations(llm, 2)
        assert tokens == expected[:8] and without < cached


def test_a_preempted_request_goes_on_from_the_host_with_the_same_tokens() -> None:
    prompts: list[Prompt] = [
        {"prompt_token_ids": [(31 * row + 7 * i) % 2000 + 5 for i in range(60 + 9 * row)]}
        for row in range(4)
    ]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=200, ignore_eos=True)
    with engine(num_gpu_blocks_override=1000) as llm:
        expected = generate(llm, prompts, params)
    with engine(num_gpu_blocks_override=36, host_cache_memory=256 << 20) as llm:
        assert generate(llm, prompts, params) == expected
        stats = llm._text.local.engine.stats()
        assert dict(stats.preemptions)["offload"] > 0
        assert stats.loaded_blocks > 0
        llm.check()
