"""Virtual time: the same input, the same report; times that follow from the table; routes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from quire.config import EngineConfig
from quire.latency_table import LatencyTable
from quire.simulation import ledger
from quire.simulation.generate import SHAPES, Vocabulary, generate
from quire.simulation.run import simulate
from quire.simulation.trace import Arrival, parse, to_line
from quire_worker.simulated.tokens import oracle

STEP_MS = 8.0
TABLE = LatencyTable.constant(
    STEP_MS * 1e3, num_blocks=600, max_model_len=1024, vocab_size=997, block_bytes=4096
)
CONFIG = EngineConfig(max_num_seqs=16)


def arrivals(count: int, gap_s: float, prompt: int = 40, output: int = 12) -> list[Arrival]:
    return [Arrival(i * gap_s, prompt, output, f"r{i}") for i in range(count)]


def vocabulary() -> Vocabulary:
    def answer(prompt, number, count):
        tokens, _ = oracle(
            prompt.tolist(), seed=number, max_tokens=count, max_model_len=1024, vocab_size=997,
            ignore_eos=True,
        )  # fmt: skip
        return np.array(tokens, np.int32)

    return Vocabulary(997, 1024, answer)


def test_a_constant_table_is_the_inter_token_latency():
    report = simulate(arrivals(20, 0.05), TABLE, CONFIG).report
    assert report["completed"] == 20 and report["output_tokens"] == 240
    itl = report["itl_ms"]
    assert itl["p50"] == itl["p99"] == itl["max"] == pytest.approx(STEP_MS, abs=1e-3)
    assert report["ttft_ms"]["max"] < 3 * STEP_MS
    assert report["violations"] == 0 and report["preemptions"] == 0
    assert report["recomputed_share"] == 0.0


def test_a_lone_requests_time_is_its_steps():
    report = simulate(arrivals(1, 0.0), TABLE, CONFIG).report
    assert report["ttft_ms"]["max"] == pytest.approx(STEP_MS, abs=1e-3)
    assert report["e2e_ms"]["max"] == pytest.approx(12 * STEP_MS, abs=1e-3)
    assert report["steps"] >= 12


def test_the_way_to_the_client_is_counted():
    table = replace(
        TABLE, submit_micros=(3000,), deliver_micros=(2000,), round_trip_micros=(1000,),
        step_overhead_micros=(500,),
    )  # fmt: skip
    report = simulate(arrivals(1, 0.0), table, CONFIG).report
    assert report["ttft_ms"]["max"] == pytest.approx(STEP_MS + 3 + 2 + 1 + 0.5, abs=1e-3)
    # the next plan leaves before the step ends: the wire is hidden, the overhead is not
    assert report["itl_ms"]["p50"] == pytest.approx(STEP_MS + 0.5, abs=0.02)


def test_the_same_input_gives_the_same_bytes():
    rng = np.random.default_rng(0)
    points = tuple((n, 50.0 * n, 50.0 * n, n, float(2000 + 100 * n * rng.random()))
                   for n in rng.integers(1, 64, 300).tolist())  # fmt: skip
    table = replace(TABLE, points=points)
    spec = "chat:rate=20,requests=60,output=20"
    reports = []
    for seed in (1, 1, 2):
        found = generate(spec, vocabulary(), seed)
        outcome = simulate(found, table, CONFIG, workers=2, route="prefix", seed=seed)
        reports.append(json.dumps(outcome.report) + ledger.text(outcome.report))
    assert reports[0] == reports[1] != reports[2]


def test_shared_prefixes_hit_the_cache_and_others_do_not():
    hashes = tuple(bytes([i]) for i in range(4))
    same = [Arrival(i * 0.5, 80, 4, f"r{i}", block_hashes=hashes) for i in range(5)]
    report = simulate(same, TABLE, CONFIG).report
    assert report["cached_prompt_tokens"] == 4 * 64
    assert simulate(arrivals(5, 0.5, prompt=80), TABLE, CONFIG).report["prefix_hit_rate"] == 0.0


def test_a_turn_finds_the_answer_before_it_in_the_cache():
    found = generate("chat:rate=2,requests=40,turns=6,system=32", vocabulary(), 3)
    report = simulate(found, TABLE, CONFIG).report
    assert report["prefix_hit_rate"] > 0.5


def test_too_little_memory_preempts_and_completes():
    config = replace(CONFIG, num_gpu_blocks_override=24)
    report = simulate(arrivals(12, 0.001, prompt=60, output=60), TABLE, config).report
    assert report["completed"] == 12 and report["violations"] == 0
    assert report["preemptions"] > 0 and report["recomputed_share"] > 0
    assert report["kv_peak"] > 0.9


def test_more_workers_share_the_load_and_a_prefix_stays_with_one():
    many = arrivals(60, 0.0, output=30)
    one = simulate(many, TABLE, CONFIG).report["e2e_ms"]["p99"]
    outcome = simulate(many, TABLE, CONFIG, workers=4)
    assert outcome.report["e2e_ms"]["p99"] < one / 2
    assert {s.group for s in outcome.ledger.seen} == {0, 1, 2, 3}
    hashes = (b"a",)
    alike = [Arrival(i * 0.5, 40, 4, f"r{i}", block_hashes=hashes) for i in range(8)]
    outcome = simulate(alike, TABLE, CONFIG, workers=4, route="prefix")
    assert len({s.group for s in outcome.ledger.seen}) == 1


def test_what_can_not_run_is_refused_with_its_name_and_time_can_be_limited():
    config = replace(CONFIG, max_waiting=0, max_num_seqs=2)
    report = simulate([*arrivals(6, 0.0), Arrival(9.0, 5000, 1, "long")], TABLE, config).report
    assert report["failed"] == {"context_length_exceeded": 1, "queue_full": 4}
    report = simulate(arrivals(6, 1.0), TABLE, CONFIG, max_time=2.5).report
    assert report["requests"] == 3 and report["virtual_s"] <= 2.5


@pytest.mark.parametrize("shape", SHAPES)
def test_made_up_traces_repeat_and_survive_a_file(shape):
    spec = f"{shape}:rate=5,requests=50"
    found = generate(spec, vocabulary(), 7)
    assert found == generate(spec, vocabulary(), 7) != generate(spec, vocabulary(), 8)
    assert len(found) == 50 and all(a.num_prompt_tokens < 1024 for a in found)
    times = [a.arrival_s for a in found]
    assert times == sorted(times)
    lines = [to_line(a).encode() for a in found]
    again = list(parse(lines, "x"))
    assert [a.prompt_token_ids for a in again] == [a.prompt_token_ids for a in found]
