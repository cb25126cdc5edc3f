"""Microseconds of one scheduling step: schedule, encode, apply the result, deferred publishing.

Run by hand: python tests/unit/scheduler/bench_schedule.py [rows ...]. No worker, no wire: results
are made up, so that what is timed is the scheduler alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

# ruff: noqa: E402
import numpy as np
from sched_helpers import Rig

from fakes.worker import Options
from quire.v1 import step_pb2
from quire_scheduler import results
from quire_scheduler.schedule import publish_outputs, schedule

PROMPT, OUTPUT, STEPS = 64, 900, 400


def bench(rows: int) -> dict[str, float]:
    """Median microseconds of each part over decode-only steps of `rows` requests."""
    options = Options(
        num_blocks=rows * 64 + 2, max_slots=rows + 8, max_model_len=1024, vocab_size=32000
    )
    rig = Rig(options, max_num_seqs=rows, max_num_batched_tokens=8192, max_waiting=rows)
    rng = np.random.default_rng(0)
    for _ in range(rows):
        length = PROMPT + int(rng.integers(0, 16))  # block boundaries spread over the steps
        prompt = rng.integers(3, 32000, length).astype(np.int32)
        rig.submit(prompt, max_tokens=OUTPUT)
    driver = rig.engine._driver
    rig.engine._take_inbox()
    state, limits = driver.state, driver._limits
    assert state is not None
    times: dict[str, list[float]] = {k: [] for k in ("schedule", "encode", "apply", "deferred")}
    pending = []
    seq = 0
    while len(times["apply"]) < STEPS:
        a = time.perf_counter()
        plan = schedule(state, limits, 1, seq + 1)
        b = time.perf_counter()
        assert plan is not None
        seq += 1
        step_pb2.SchedulerFrame(plan=plan.to_proto()).SerializeToString()
        c = time.perf_counter()
        pending.append(plan)
        publish_outputs(state, seq)
        d = time.perf_counter()
        if len(pending) < 2:
            continue
        plan = pending.pop(0)
        slots = plan.sampled
        result = step_pb2.StepResult(
            slots=slots.tobytes(),
            num_outputs=bytes([1]) * len(slots),
            token_ids=rng.integers(3, 32000, len(slots)).astype("<i4").tobytes(),
            finished=bytes(len(slots)),
        )
        e = time.perf_counter()
        results.apply(state, plan, result, 32000)
        f = time.perf_counter()
        if len(plan.slots) == rows and (plan.num_tokens == 1).all():
            for key, value in zip(times, (b - a, c - b, f - e, d - c), strict=True):
                times[key].append(value * 1e6)
    return {key: float(np.median(values)) for key, values in times.items()}


if __name__ == "__main__":
    print(f"{'rows':>6} {'schedule':>9} {'encode':>9} {'apply':>9} {'deferred':>9}  us, median")
    for rows in [int(a) for a in sys.argv[1:]] or [1, 64, 256, 1024]:
        parts = bench(rows)
        print(f"{rows:>6} " + " ".join(f"{v:9.0f}" for v in parts.values()))
