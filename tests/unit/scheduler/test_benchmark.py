"""benchmarks/scheduler.py runs and measures what it says: a short form, without figures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "scheduler.py"


def test_the_step_benchmark_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    arguments = ["--rows", "32", "--clients", "3", "--prompt", "40", "--steps", "20"]
    arguments += ["--blocks", "200", "--evictions", "50", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    record = json.loads(out.read_text())
    assert record["steps_ms"]["32"]["critical"] > 0
    assert record["blocks_per_step"]["32"] == 2.0, "one row in sixteen needs a block"
    assert record["lookup_32k_us"] > 0
    assert set(record["eviction_us"]) == {"lru", "lfu", "fifo"}
    assert "milliseconds a step" in capsys.readouterr().out
