"""The commands: quire simulate on files, a simulated worker behind real services."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flow.processes import QUIRE, Process, addresses, clean_environ, get, post, run, until

TABLE = {
    "model": "demo",
    "vocab_size": 512,
    "max_model_len": 512,
    "num_blocks": 256,
    "points": [{"num_tokens": 1, "micros": 4000}],
}


def table(folder: Path) -> str:
    path = folder / "table.json"
    path.write_text(json.dumps(TABLE))
    return str(path)


def test_a_trace_is_simulated_and_the_report_repeats(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    words = ("--table", table(tmp_path), "--seed", "3")
    made = run("simulate", *words, "--generate", "chat:rate=8,requests=40", "--write-trace",
               str(trace))  # fmt: skip
    assert made.returncode == 0, made.stderr
    reports = []
    for _ in range(2):
        done = run("simulate", *words, "--trace", str(trace), "--json", "--max-num-seqs", "4")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report.pop("simulator")["steps_per_s"] > 0
        reports.append(report)
    assert reports[0] == reports[1]
    assert reports[0]["completed"] == reports[0]["requests"] == 40
    assert reports[0]["prefix_hit_rate"] > 0.2 and reports[0]["violations"] == 0
    told = run("simulate", *words, "--trace", str(trace), "--workers", "3")
    assert re.search(r"TTFT +\d+\.\d\d", told.stdout) and "3 worker(s)" in told.stdout


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"arrival_s": 0, "num_prompt_tokens": -4, "num_output_tokens": 1}\n')
    for words, said in (
        (("--trace", str(bad), "--table", table(tmp_path)), "bad.jsonl:1: num_prompt_tokens"),
        (("--trace", str(bad)), "--table"),
        (("--table", table(tmp_path)), "--trace FILE or --generate SPEC"),
        (("--generate", "chat", "--table", str(bad)), "latency table"),
        (("--generate", "chat", "--table", table(tmp_path), "--workers", "99999"), "--workers"),
    ):
        done = run("simulate", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_services_serve_from_a_simulated_worker_and_its_journal_is_a_table(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    environ = {**clean_environ(), **addresses(), "QUIRE_JOURNAL": str(journal)}
    command = [*QUIRE, "serve", "--simulate", table(tmp_path), "--max-num-seqs", "8"]
    with Process(command, environ) as server:
        server.line("Ready in")
        port = int(environ["QUIRE_PORT"])
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "seed": 5,
                "ignore_eos": True}  # fmt: skip
        answers = [post(port, "/v1/completions", json.dumps(body).encode()) for _ in range(4)]
        assert {status for status, _ in answers} == {200}
        found = [json.loads(text) for _, text in answers]
        assert len({answer["choices"][0]["text"] for answer in found}) == 1
        assert found[0]["usage"]["completion_tokens"] == 24
        until(lambda: b"quire_worker_steps_total" in get(port, "/metrics")[1], what="heartbeat")
    out = tmp_path / "table2.json"
    done = run("simulate", "--table", str(journal), "--calibrate", str(out))
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())
    assert measured["model"] == "demo" and measured["max_model_len"] == 512
    took = sorted(point["micros"] for point in measured["points"])
    assert len(took) >= 80 and took[len(took) // 2] == 4000
    done = run("simulate", "--trace", str(journal), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["completed"] == 4 and report["output_tokens"] == 96
    assert 4.0 <= report["itl_ms"]["p50"] < 8.0
