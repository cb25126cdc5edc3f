"""config.json in both layouts, its defaults, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.checkpoints import ARCHITECTURES, EOS_TOKEN_ID, IM_END_TOKEN_ID, make_checkpoint
from quire.errors import ModelError
from quire_worker.models.config import DecoderConfig, parse_config, read_config


def values(arch: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    base = {
        "architectures": [arch], "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }  # fmt: skip
    merged = {**base, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def parse(arch: str = "LlamaForCausalLM", **changes: Any) -> DecoderConfig:
    return parse_config(values(arch, **changes))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_reading_agrees_with_that_of_transformers(tmp_path: Path, arch: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(tmp_path, arch)
    ours, theirs = read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (EOS_TOKEN_ID, IM_END_TOKEN_ID)


def test_missing_fields_have_the_defaults_of_their_family() -> None:
    config = parse(num_key_value_heads=..., max_position_embeddings=...)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 16, 2048)
    assert (config.rope.theta, config.norm_eps, config.dtype) == (10000.0, 1e-6, "")
    assert parse("Qwen3ForCausalLM").head_dim == 128
    assert parse("Qwen2ForCausalLM").qkv_bias
    assert not parse("Qwen2ForCausalLM").o_bias
    assert parse("MistralForCausalLM").sliding_window == 4096
    assert parse("MistralForCausalLM", sliding_window=None).sliding_window == 0


def test_both_layouts_of_rope_and_dtype_are_read() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    old = parse(rope_theta=500.0, rope_scaling=scaling, torch_dtype="bfloat16")
    new = parse(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        dtype="bfloat16",
    )
    assert old == new
    assert (old.rope.kind, old.rope.factor, old.rope.theta, old.dtype) == (
        "linear", 2.0, 500.0, "bfloat16",
    )  # fmt: skip


def test_windows_of_qwen_follow_layer_types_or_max_window_layers() -> None:
    on = {"use_sliding_window": True, "sliding_window": 8}
    assert parse("Qwen2ForCausalLM", sliding_window=8).layer_windows == (0, 0, 0)
    assert parse("Qwen2ForCausalLM", max_window_layers=1, **on).layer_windows == (0, 8, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse("Qwen3ForCausalLM", layer_types=types, **on).layer_windows == (8, 0, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaFor", "Qwen3For"]),
        ({"architectures": ...}, ["architectures"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"num_attention_heads": True}, ["num_attention_heads"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"num_attention_heads": 5}, ["head_dim", "64", "5"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"dtype": "int8"}, ["dtype", "int8", "bfloat16"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, ["dynamic", "llama3", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "factor", "missing"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["per-layer-type"]),
        ({"eos_token_id": 100}, ["eos_token_id", "100"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
    ],
)
def test_errors_name_the_field_and_what_is_expected(changes: Any, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist.*--model"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected an object"):
        read_config(tmp_path)
    quantised = values(quantization_config={"quant_method": "awq"})
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="awq"):
        read_config(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert read_config(folder).architecture == "LlamaForCausalLM"
