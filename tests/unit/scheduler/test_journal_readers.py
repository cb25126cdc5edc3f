"""Those who read a journal: the replay's player, the timeline, the trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sched_helpers import Rig

from fakes.worker import FakeWorker, Options
from quire.cli import player, timeline, trace
from quire.link import QueueLink
from quire.v1 import common_pb2, step_pb2
from quire_scheduler import journal as journals
from quire_scheduler.segment import Direction, Segment, segments
from quire_worker.simulated.memory import SimulatedMemory

Results = dict[tuple[int, int], step_pb2.StepResult]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(journals, "MAX_SEGMENT_BYTES", 3000)
    yield


def run(folder: Path, *, options: Options | None = None, **config: object) -> Rig:
    """Requests with shared prefixes, one cancelled, one for a vector, a preemption or two."""
    options = options or Options(num_blocks=10, eos_every=40)
    rig = Rig(options, journal=str(folder), max_num_batched_tokens=64, **config)
    shared = list(range(3, 53))
    for n in range(6):
        rig.submit([*shared, n], max_tokens=30, seed=n, request_id=f"chat-{n}", logprobs=n % 2)
        rig.turn()
    rig.submit([7] * 20, max_tokens=1, request_id="vector", kind=common_pb2.REQUEST_KIND_POOL)
    gone = rig.submit([9] * 40, max_tokens=400, ignore_eos=True, request_id="gone")
    for _ in range(3):
        rig.turn()
    rig.run(until=7)
    rig.engine.cancel(rig.client, gone)
    rig.settle()
    rig.engine.stop()
    return rig


class Rewritable(SimulatedMemory):
    """A replay computes a cached prefix again into blocks that others read: with equal content."""

    def _claim(self, blocks: np.ndarray) -> None:
        self.holders[blocks] = 0
        super()._claim(blocks)

    def write_span(self, slot: int, blocks: np.ndarray, start: int, states: np.ndarray) -> None:
        self.owner[blocks] = (
            slot  # a prompt may go on in a block that was computed ahead for another
        )
        self.filled[blocks] = 0
        self.filled[blocks[0]] = start % self.block_size
        super().write_span(slot, blocks, start, states)


def replay(folder: Path, options: Options) -> tuple[Results, Results]:
    """(recorded, replayed) results of all segments, each with a worker that holds nothing."""
    recorded: Results = {}
    replayed: Results = {}
    for path in segments(folder):
        worker = FakeWorker(QueueLink().worker(), options)
        memory = Rewritable(options.num_blocks, options.block_size, options.num_host_blocks)
        worker.inner.steps.memory = memory
        playing = player.Player(worker.execute)
        playing.new_worker(options.block_size)
        for record in Segment(path):
            if record.direction is Direction.PLAN:
                plan = step_pb2.SchedulerFrame.FromString(record.frame).plan
                replayed[plan.epoch, plan.seq] = playing.play(plan)
                continue
            message = step_pb2.WorkerFrame.FromString(record.frame)
            if message.HasField("result"):
                recorded[message.result.epoch, message.result.seq] = message.result
        assert worker.violations == []
    return recorded, replayed


# -- the player ---------------------------------------------------------------------------
@pytest.mark.parametrize("caching", [True, False])
def test_every_segment_alone_brings_the_same_results(
    tmp_path: Path, tiny: None, caching: bool
) -> None:
    rig = run(tmp_path / "j", enable_prefix_caching=caching)
    assert rig.engine.stats().num_preemptions > 0
    recorded, replayed = replay(tmp_path / "j", rig.options)
    assert len(segments(tmp_path / "j")) > 3 and len(recorded) > 50
    for step, result in recorded.items():
        assert player.difference(result, replayed[step]) is None


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100), st.integers(1, 30)), min_size=1,
             max_size=8),
    st.integers(12, 40),
    st.sets(st.integers(2, 40), max_size=2),
)  # fmt: skip
def test_any_load_with_failing_steps_replays(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: None,
    requests: list[tuple[int, int, int]],
    num_blocks: int,
    failing: set[int],
) -> None:
    folder = tmp_path_factory.mktemp("journal") / "j"
    options = Options(num_blocks=num_blocks)
    left = set(failing)

    def fail(plan: step_pb2.StepPlan, worker: FakeWorker) -> str:
        if worker.num_steps in left:
            left.discard(worker.num_steps)
            return "boom"
        return ""

    options.fail = fail
    rig = Rig(options, journal=str(folder), max_num_batched_tokens=48)
    for family, length, max_tokens in requests:
        prompt = [(family * 131 + i * 7) % 900 + 3 for i in range(length)]
        rig.submit(prompt, max_tokens=max_tokens, seed=family)
    rig.run()
    rig.engine.stop()
    recorded, replayed = replay(folder, Options(num_blocks=num_blocks))
    for step, result in recorded.items():
        if not player.failed(result):
            assert player.difference(result, replayed[step]) is None


def result(**fields: object) -> step_pb2.StepResult:
    values: dict[str, object] = {
        "status": step_pb2.STEP_STATUS_OK, "slots": i32(4, 9), "num_outputs": b"\1\1",
        "token_ids": i32(100, 200), "finished": b"\0\0",
    }  # fmt: skip
    return step_pb2.StepResult(**{**values, **fields})  # type: ignore[arg-type]


def i32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def with_logprobs(value: float) -> step_pb2.StepResult:
    found = result()
    found.logprobs.counts = i32(2, 1)
    found.logprobs.ranks = i32(1, 1)
    found.logprobs.token_ids = i32(100, 5, 200)
    found.logprobs.logprobs = np.array([-1, -2, value], "<f4").tobytes()
    return found


def erring(message: str) -> step_pb2.StepResult:
    error = common_pb2.Error(name="numeric_error", message=message)
    return result(row_errors=[step_pb2.RowError(slot=9, error=error)])


@pytest.mark.parametrize(
    ("other", "slot", "what"),
    [
        (result(token_ids=i32(100, 201)), 9, "token"),
        (result(num_outputs=b"\0\1", token_ids=i32(200)), 4, "token"),
        (result(finished=b"\0\1"), 9, "finished"),
        (result(slots=i32(4, 8)), -1, "rows"),
        (result(status=step_pb2.STEP_STATUS_FAILED), -1, "status"),
        (result(pooled=bytes(4)), -1, "pooled"),
        (erring("NaN"), 9, "error"),
        (with_logprobs(-3), -1, "logprobs.counts"),
    ],
)
def test_the_first_difference_is_named(other: step_pb2.StepResult, slot: int, what: str) -> None:
    found = player.difference(result(), other)
    assert found is not None and (found.slot, found.what) == (slot, what)
    assert found.expected != found.got
    assert player.difference(other, other) is None


def test_a_logprob_that_differs_in_one_bit_is_named() -> None:
    value = np.float32(-3)
    found = player.difference(with_logprobs(value), with_logprobs(np.nextafter(value, value - 1)))
    assert found is not None and (found.slot, found.what) == (9, "logprobs.logprobs")


# -- the timeline -------------------------------------------------------------------------
def test_the_timeline_tells_who_came_and_went(tmp_path: Path, tiny: None) -> None:
    run(tmp_path / "j")
    found = list(timeline.events(map(Segment, segments(tmp_path / "j"))))
    kinds = [event["kind"] for event in found]
    assert kinds[:3] == ["segment", "hello", "plan"]
    assert kinds.count("segment") == kinds.count("hello") == len(segments(tmp_path / "j"))
    plans = [event for event in found if event["kind"] == "plan"]
    came = {a["request"] for event in plans for a in event["admits"]}
    assert came == {*(f"chat-{n}" for n in range(6)), "vector", "gone"}
    assert any(a["computed"] for event in plans for a in event["admits"])
    results = [event for event in found if event["kind"] == "result"]
    assert {r["status"] for r in results} == {"ok"}
    assert any(event["stopped"] for event in results)
    assert all(event["ms"]["total"] >= 0 for event in results)
    lines = [timeline.text(event) for event in found]
    assert all("\n" not in line for line in lines)
    assert any("- slot" in line and "chat-0" in line for line in lines)
    json.dumps(found)


def test_a_torn_journal_is_shown_to_the_tear(tmp_path: Path) -> None:
    run(tmp_path / "j")
    (path,) = segments(tmp_path / "j")
    path.write_bytes(path.read_bytes()[:-3])
    last = list(timeline.events([Segment(path)]))[-1]
    assert last["kind"] == "torn" and str(last["byte"]) in timeline.text(last)


# -- the trace ----------------------------------------------------------------------------
@pytest.mark.parametrize("privacy", ["full", "hashed", "none"])
def test_a_trace_holds_each_request_once(tmp_path: Path, tiny: None, privacy: str) -> None:
    rig = run(tmp_path / "j", journal_privacy=privacy)
    lines, left_out = trace.arrivals(map(Segment, segments(tmp_path / "j")))
    by_name = {line["request_id"]: line for line in lines}
    assert len(by_name) == len(lines) == 8 and left_out == 0
    for n in range(6):
        line = by_name[f"chat-{n}"]
        assert line["num_prompt_tokens"] == 51
        assert line["num_output_tokens"] == len(rig.client[n].tokens)
        assert ("prompt_token_ids" in line) is (privacy == "full")
        assert ("block_hashes" in line) is (privacy != "none")
    assert by_name["vector"]["num_output_tokens"] == 1
    first, second = by_name["chat-0"], by_name["chat-1"]
    assert first["arrival_s"] == 0.0
    if privacy == "full":
        assert first["prompt_token_ids"] == [*range(3, 53), 0]
        assert len(first["block_hashes"]) == 3
        assert first["block_hashes"] == second["block_hashes"]


def test_blocks_of_a_trace_are_hashed_with_all_before_them() -> None:
    hashes: Callable[..., list[str]] = lambda *t: trace.block_hashes(i32(*t), 2)  # noqa: E731
    assert hashes(1, 2, 3, 4, 5)[:1] == hashes(1, 2)
    assert hashes(1, 2, 3, 4)[1] != hashes(5, 6, 3, 4)[1]
    assert len(hashes(1, 2, 3)) == 1


# -- the command --------------------------------------------------------------------------
def quire(*words: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom quire.cli import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\nsys.exit(status)"
    )
    command = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_show_filters_and_needs_no_tensor_library(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    run(folder)
    everything = quire("journal", "show", str(folder)).stdout.splitlines()
    mine = quire("journal", "show", str(folder), "--request", "gone", "--json")
    events = [json.loads(line) for line in mine.stdout.splitlines()]
    assert 0 < len(events) < len(everything)
    assert events[0]["admits"][-1]["request"] == "gone"
    assert quire("journal", "show", str(folder), "--epoch", "99").stdout == ""
    assert quire("journal", "show", str(folder), "--from", "1e6").stdout == ""
    traced = quire("journal", "trace", str(folder))
    assert len(traced.stdout.splitlines()) == 8


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["journal"], "expected show or trace"),
        (["journal", "eat", "x"], "expected show or trace"),
        (["journal", "show"], "which journal"),
        (["journal", "show", "/no/such"], "neither"),
        (["journal", "show", "/no/such", "--epoch", "-1"], "--epoch must be between"),
        (["replay"], "which journal"),
        (["replay", "/no/such", "more"], "does not take 'more'"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(words: list[str], part: str) -> None:
    done = quire(*words)
    assert done.returncode == 2 and part in done.stderr


def test_a_damaged_journal_is_shown_to_the_damage(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    run(folder)
    (path,) = segments(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    done = quire("journal", "show", str(folder))
    assert done.returncode == 1 and "damaged at byte" in done.stderr
    assert len(done.stdout.splitlines()) > 10
