"""Latency tables and traces from files: what is wrong is said with its place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quire import latency_table
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.latency_table import LatencyTable
from quire.simulation.generate import parse as parse_spec
from quire.simulation.trace import parse

GOOD = {"arrival_s": 0.5, "num_prompt_tokens": 3, "num_output_tokens": 2}


def test_a_table_survives_its_file(tmp_path):
    table = LatencyTable.constant(125.5, model="m", num_blocks=77, num_host_blocks=5)
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    assert latency_table.read(str(path)) == table


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"points": []}, "0 points"),
        ({"points": [{"num_tokens": 0, "micros": 5}]}, "num_tokens of at least 1"),
        ({"points": [{"num_tokens": 1, "micros": -1}]}, r"points\[0\].micros"),
        ({"points": [{"num_tokens": 1, "micros": 1e300}]}, r"points\[0\].micros"),
        ({"points": [{"num_tokens": 1, "micro": 1}]}, "unknown field 'micro'"),
        ({"points": [7]}, r"points\[0\]"),
        ({"num_blocks": 1 << 40}, "num_blocks"),
        ({"num_blocks": True}, "num_blocks"),
        ({"max_slots": "8"}, "max_slots"),
        ({"submit_micros": [1, -2]}, "submit_micros"),
        ({"deliver_micros": []}, "deliver_micros"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"model_digest": "xyz"}, "hexadecimal"),
        ({"vocab_size": 100, "eos_token_id": 100}, "eos_token_id"),
    ],
)
def test_a_wrong_table_names_field_and_value(change, match, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"points": [{"num_tokens": 1, "micros": 5}], **change}))
    with pytest.raises(ConfigError, match=match):
        latency_table.read(str(path))


def test_times_that_vary_keep_their_quantiles():
    assert latency_table.spread([]) == (0,) and latency_table.spread([7.9]) == (7,)
    values = latency_table.spread([float(v) for v in range(10_000)])
    assert len(values) == 201 and values == tuple(sorted(values))
    assert abs(values[100] - 5000) < 60 and values[-1] > 9900


def test_no_table_at_all(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        latency_table.read(str(tmp_path / "none"))
    (tmp_path / "t").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not valid JSON"):
        latency_table.read(str(tmp_path / "t"))


def test_settings_size_the_simulated_worker():
    table = LatencyTable.constant(
        1.0, block_size=16, num_blocks=101, block_bytes=1000, copy_micros=10
    )
    plain = table.sized(EngineConfig(max_num_seqs=64))
    assert (plain.num_blocks, plain.max_slots, plain.max_model_len) == (101, 72, 1600)
    wide = table.sized(EngineConfig(block_size=32))
    assert (wide.num_blocks, wide.block_bytes, wide.copy_micros) == (51, 2000, 20)
    assert table.sized(EngineConfig(num_gpu_blocks_override=40)).num_blocks == 40
    given = table.sized(EngineConfig(kv_cache_memory_bytes=50_000, host_cache_memory=70_000))
    assert (given.num_blocks, given.num_host_blocks) == (50, 70)
    assert replace(table, max_model_len=64).sized(EngineConfig()).max_model_len == 64


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "t:2: not valid JSON"),
        ("[]", "t:2: expected an object"),
        ({**GOOD, "arrival_s": "x"}, "t:2: arrival_s"),
        ({**GOOD, "arrival_s": float("nan")}, "t:2: arrival_s"),
        ({**GOOD, "arrival_s": -1}, "t:2: arrival_s"),
        ({**GOOD, "num_prompt_tokens": 0}, "t:2: num_prompt_tokens"),
        ({**GOOD, "num_prompt_tokens": 1 << 40}, "t:2: num_prompt_tokens"),
        ({**GOOD, "num_output_tokens": 1.5}, "t:2: num_output_tokens"),
        ({**GOOD, "prompt_token_ids": [1]}, "prompt_token_ids has 1"),
        ({**GOOD, "prompt_token_ids": [1, 2, -3]}, "no token id"),
        ({**GOOD, "block_hashes": ["zz"]}, "t:2: block_hashes"),
        ({**GOOD, "priority": 1 << 33}, "t:2: priority"),
        ({**GOOD, "request_id": ""}, "t:2: request_id"),
        ({**GOOD, "colour": 1}, "t:2: unknown field 'colour'"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(line, match):
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(ConfigError, match=match):
        list(parse([json.dumps(GOOD).encode(), text.encode()], "t"))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("storm:rate=5", "not one of"),
        ("chat:rates=5", "unknown 'rates'"),
        ("chat:rate=0", "rate must be a number between"),
        ("chat:turns=1.5", "turns must be an integer"),
        ("rag:documents=9999999999", "documents must be"),
    ],
)
def test_a_wrong_spec_is_named(spec, match):
    with pytest.raises(ConfigError, match=match):
        parse_spec(spec)
