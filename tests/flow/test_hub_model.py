"""A published checkpoint from the hub: needs the network, so it is off by default."""

from __future__ import annotations

import os

import pytest

from quire import LLM, SamplingParams

MODEL = os.environ.get("TEST_MODEL", "Qwen/Qwen3-0.6B")


@pytest.mark.model
@pytest.mark.timeout(3600)
def test_greedy_tokens_equal_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The capital of France is"
    with LLM(MODEL, dtype="float32", max_model_len=512) as llm:
        ours = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=64)
    assert ours[0].outputs[0].token_ids == out[0, ids.shape[1] :].tolist()
