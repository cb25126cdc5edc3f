"""Benchmarks are run by hand and rarely: here at least they start, and the quick one runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rules.sources import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *words],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_tells_its_flags(name: str) -> None:
    assert "usage" in run(name, "--help")


def test_eviction_policies_are_compared() -> None:
    lines = run("eviction.py", "--requests", "120", "--sizes", "0.2").splitlines()
    head = next(line for line in lines if "lfu_%" in line)
    assert "lru_%" in head and "fifo_%" in head
    assert [line.split()[0] for line in lines[-3:]] == ["chat", "rag", "agents"]


def test_results_are_json_with_what_it_takes_to_repeat_them() -> None:
    for path in Path(FOLDER / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"date", "command", "machine", "python"} <= set(result), path.name
