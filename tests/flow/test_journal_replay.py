"""The journal reproduces a run: its plans, given to a fresh worker, bring the same results."""

from __future__ import annotations

from pathlib import Path

from quire import LLM, EngineConfig, SamplingParams
from quire.v1 import step_pb2
from quire_scheduler.journal import Direction, read
from quire_worker.worker import Worker

SETTINGS = {"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 48}


def test_plans_of_a_journal_bring_the_same_results(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    prompts = [{"prompt_token_ids": list(range(10, 10 + 17 * n))} for n in range(1, 9)]
    params = [
        SamplingParams(temperature=n % 2, seed=n, max_tokens=20, logprobs=1) for n in range(8)
    ]
    with LLM("demo", journal=path, **SETTINGS) as llm:
        llm.generate(prompts, params)
    worker = Worker(EngineConfig(**SETTINGS))
    replayed: list[step_pb2.StepResult] = []
    recorded: list[step_pb2.StepResult] = []
    for record in read(path):
        if record.direction is Direction.PLAN:
            frame = step_pb2.SchedulerFrame.FromString(record.frame)
            replayed.append(worker.execute(frame.plan))
        else:
            message = step_pb2.WorkerFrame.FromString(record.frame)
            if message.HasField("result"):
                recorded.append(message.result)
    assert len(recorded) > 20
    assert 0 <= len(replayed) - len(recorded) <= 2  # plans in flight when the engine stopped
    for ours, theirs in zip(replayed, recorded, strict=False):
        for result in (ours, theirs):  # what may differ: who ran it, and how fast
            for name in ("timings", "worker_epoch", "device_memory_bytes"):
                result.ClearField(name)  # type: ignore[arg-type]
        assert ours == theirs
