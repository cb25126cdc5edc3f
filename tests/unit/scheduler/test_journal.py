"""The journal: the very frames, in bounded segments that begin with all that lives."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

import numpy as np
import pytest
from sched_helpers import Rig

from fakes.worker import Options
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.v1 import common_pb2, step_pb2
from quire_scheduler import journal as journals
from quire_scheduler.counters import Counters
from quire_scheduler.journal import Journal
from quire_scheduler.redact import Redactor
from quire_scheduler.segment import DamagedSegment, Direction, Record, Segment, segments

MIB = 1 << 20


def journal(folder: Path, **settings: object) -> Journal:
    return Journal(EngineConfig(journal=str(folder), **settings), Counters())


def records(folder: Path) -> list[Record]:
    return [record for path in segments(folder) for record in Segment(path)]


def plans(path: Path) -> list[step_pb2.StepPlan]:
    found = [r.frame for r in Segment(path) if r.direction is Direction.PLAN]
    return [step_pb2.SchedulerFrame.FromString(frame).plan for frame in found]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# -- what is recorded ---------------------------------------------------------------------
def test_it_holds_the_very_frames(tmp_path: Path) -> None:
    rig = Rig(hello=False, journal=str(tmp_path / "j"))
    sent: list[bytes] = []
    came: list[bytes] = []
    send, put = rig.link.send, rig.worker.link.send
    rig.link.send = lambda peer, frame: (sent.append(frame), send(peer, frame))[1]
    rig.worker.link.send = lambda frame: (came.append(frame), put(frame))[1]
    rig.worker.hello()
    rig.submit([5, 6, 7], max_tokens=9)
    rig.run()
    rig.worker.heartbeat()
    rig.turn()
    rig.engine.stop()
    found = records(tmp_path / "j")
    wanted = [f for f in sent if step_pb2.SchedulerFrame.FromString(f).HasField("plan")]
    answers = [f for f in came if not step_pb2.WorkerFrame.FromString(f).HasField("heartbeat")]
    assert [r.frame for r in found if r.direction is Direction.PLAN] == wanted
    assert [r.frame for r in found if r.direction is Direction.WORKER] == answers
    times = [r.monotonic_ns for r in found]
    assert times == sorted(times) and len(wanted) >= 9


def test_a_worker_that_was_refused_is_not_recorded(tmp_path: Path) -> None:
    rig = Rig(Options(block_size=8), block_size=16, journal=str(tmp_path / "j"))
    rig.turn()
    assert rig.worker.refusal
    rig.engine.stop()
    assert records(tmp_path / "j") == []


def test_an_admission_says_how_long_it_waited(tmp_path: Path) -> None:
    rig = Rig(max_num_seqs=1, journal=str(tmp_path / "j"))
    rig.submit([5, 6, 7], max_tokens=1)
    rig.submit([5, 6, 8])
    rig.turn(0)
    rig.now += 2.5
    rig.run()
    rig.engine.stop()
    (path,) = segments(tmp_path / "j")
    first, second = (admit for plan in plans(path) for admit in plan.admit)
    assert first.waited_micros < 0.1e6
    assert 2.5e6 <= second.waited_micros < 2.6e6


def test_the_header_says_what_replay_needs(tmp_path: Path) -> None:
    journal(tmp_path / "j", model="some/model", journal_privacy="hashed").close()
    (path,) = segments(tmp_path / "j")
    header = Segment(path).header
    assert (header.model, header.privacy, header.number) == ("some/model", "hashed", 0)
    assert path.stat().st_mode & 0o777 == 0o600


# -- segments -----------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_SEGMENT_BYTES", 2000)


def load(rig: Rig) -> None:
    for n in range(6):
        rig.submit([n, *range(40)], max_tokens=40, seed=n)
    rig.run()


def test_a_segment_begins_with_all_that_runs(tmp_path: Path, tiny: None) -> None:
    plain, rig = Rig(), Rig(journal=str(tmp_path / "j"))
    load(plain)
    load(rig)
    rig.engine.stop()
    found = segments(tmp_path / "j")
    assert len(found) > 3
    assert [Segment(path).header.number for path in found] == list(range(len(found)))
    for path in found[1:]:
        first = next(iter(Segment(path)))
        assert step_pb2.WorkerFrame.FromString(first.frame).HasField("hello")
        opening = plans(path)[0]
        assert opening.seq == 1 and not opening.slots
        known = {admit.slot for admit in opening.admit}
        for plan in plans(path)[1:]:
            known |= {admit.slot for admit in plan.admit}
            assert set(np.frombuffer(plan.slots, "<i4").tolist()) <= known
    for handle in range(6):
        assert rig.client[handle].tokens == plain.client[handle].tokens
    ours, theirs = rig.engine.counters, plain.engine.counters
    assert ours.scheduled_tokens == theirs.scheduled_tokens  # nothing is computed twice
    assert rig.engine.stats().num_preemptions == 0
    assert ours.epochs == theirs.epochs + len(found) - 1


def test_what_lived_at_the_opening_may_take_half_a_segment(tmp_path: Path, tiny: None) -> None:
    rig = Rig(Options(max_model_len=2048, num_blocks=300), journal=str(tmp_path / "j"))
    rig.submit([7] * 1500, max_tokens=100)  # its admission alone is three segments' worth
    rig.run()
    rig.engine.stop()
    found = segments(tmp_path / "j")
    assert 2 <= len(found) <= 6
    assert all(len(plans(path)) > 5 for path in found[1:-1])


def test_the_folder_stays_below_its_bound(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    writer = journal(folder, journal_max_bytes=MIB)
    names = set()
    for i in range(100):
        writer.append(Direction.PLAN, bytes(40_000), i)
        writer.flush()
        assert size(folder) <= MIB
        names |= {path.name for path in folder.iterdir()}
        if writer.full:
            writer.rotate([])
            writer.opened()
    writer.close()
    names |= {path.name for path in folder.iterdir()}
    kept = [path.name for path in segments(folder)]
    assert kept == sorted(names)[-len(kept) :] and len(names) > 20
    assert 5 <= len(kept) <= 9


def test_two_schedulers_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    first = journal(folder, journal_max_bytes=MIB)
    first.append(Direction.PLAN, b"kept", 0)
    first.flush()
    second = journal(folder, journal_max_bytes=MIB)
    for i in range(60):
        second.append(Direction.PLAN, bytes(40_000), i)
        second.flush()
        if second.full:
            second.rotate([])
    assert not second._counters.journal_failed and size(folder) <= MIB
    first.append(Direction.PLAN, b"and goes on", 1)
    first.close()
    second.close()
    oldest = segments(folder)[0]
    assert [r.frame for r in Segment(oldest)] == [b"kept", b"and goes on"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "journal-of-my-dog.qj"
    other.write_bytes(bytes(2 * MIB))
    writer = journal(tmp_path, journal_max_bytes=MIB)
    writer.append(Direction.PLAN, b"x", 0)
    writer.close()
    assert other.exists() and len(segments(tmp_path)) == 1


def test_it_waits_for_idle_or_100_ms(tmp_path: Path) -> None:
    writer = journal(tmp_path / "j")
    (path,) = (tmp_path / "j").iterdir()
    writer.flush_if_due(1, idle=True)
    empty = path.stat().st_size
    writer.append(Direction.PLAN, b"x", 0)
    writer.flush_if_due(200_000_000, idle=False)
    first = path.stat().st_size
    writer.append(Direction.PLAN, b"x", 0)
    writer.flush_if_due(250_000_000, idle=False)
    assert empty < first == path.stat().st_size
    writer.flush_if_due(250_000_001, idle=True)
    assert path.stat().st_size > first
    writer.close()


# -- trouble ------------------------------------------------------------------------------
def test_a_folder_that_cant_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--journal"):
        journal(tmp_path / "no" / "such")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="--journal"):
        journal(tmp_path / "file")


def test_a_full_disk_switches_it_off_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(journal=str(tmp_path / "j"))

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    writer = rig.engine._journal
    assert writer is not None
    writer._file.close()
    writer._file = Full()  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        load(rig)
    rig.engine.stop()
    assert all(len(rig.client[n].tokens) == 40 for n in range(6))
    assert rig.engine.counters.journal_failed and not writer.full
    told = [r.message for r in caplog.records if "journal" in r.message]
    assert len(told) == 1 and "No space left" in told[0]


def test_a_folder_that_vanishes_at_rotation_switches_it_off(tmp_path: Path, tiny: None) -> None:
    rig = Rig(journal=str(tmp_path / "j"))
    (path,) = (tmp_path / "j").iterdir()
    path.unlink()
    (tmp_path / "j").rmdir()
    load(rig)
    rig.engine.stop()
    assert rig.engine.counters.journal_failed
    assert all(len(rig.client[n].tokens) == 40 for n in range(6))


def test_requests_too_large_for_the_bound_switch_it_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = journal(tmp_path / "j", journal_max_bytes=MIB)
    with caplog.at_level(logging.ERROR):
        writer.append(Direction.PLAN, bytes(MIB), 0)
        writer.flush()
    assert "--journal-max-bytes" in caplog.text
    assert size(tmp_path / "j") <= MIB
    writer.close()


def test_a_tear_ends_the_reading_and_an_altered_byte_is_named(tmp_path: Path) -> None:
    writer = journal(tmp_path / "j")
    for i in range(3):
        writer.append(Direction.PLAN, b"frame%d" % i, i)
    writer.close()
    (path,) = segments(tmp_path / "j")
    whole = path.read_bytes()
    frames = [b"frame%d" % i for i in range(3)]
    assert [r.frame for r in Segment(path)] == frames
    for length in range(len(whole) - 26, len(whole)):
        path.write_bytes(whole[:length])
        torn = Segment(path)
        assert [r.frame for r in torn] == frames[:2]
        assert torn.torn is (length > len(whole) - 27)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(DamagedSegment, match="damaged at byte") as damage:
            list(Segment(path))
        assert damage.value.byte <= at < damage.value.byte + 400


def test_a_lock_is_held_on_the_segment_that_is_written(tmp_path: Path) -> None:
    writer = journal(tmp_path / "j")
    (path,) = segments(tmp_path / "j")
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer.close()


# -- privacy ------------------------------------------------------------------------------
def ids(*tokens: int) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def plan_frame(*prompts: bytes, names: bytes = bytes(32)) -> bytes:
    params = common_pb2.SamplingParams(
        seed=1, stop_token_ids=[17], allowed_token_ids=[18],
        logit_bias=[common_pb2.LogitBias(token_id=19, bias=1)],
    )  # fmt: skip
    admits = [
        step_pb2.Admit(
            slot=i, request_id=f"r{i}", prompt_token_ids=prompt, output_token_ids=ids(5, 6),
            sampling_params=params, grammar=common_pb2.Grammar(kind=2, text="secret"),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    ops = [step_pb2.KvOp(op_id=1, block_names=names)]
    plan = step_pb2.StepPlan(epoch=1, seq=1, admit=admits, block_names=names, kv_ops=ops)
    return step_pb2.SchedulerFrame(plan=plan).SerializeToString()


def result_frame() -> bytes:
    result = step_pb2.StepResult(
        epoch=1, seq=1, slots=ids(0, 1), num_outputs=b"\1\1", token_ids=ids(7, 7), pooled=bytes(8),
        error="RuntimeError: token 7",
        row_errors=[step_pb2.RowError(error=common_pb2.Error(name="x", message="token 7"))],
    )  # fmt: skip
    result.logprobs.logprobs = bytes(8)
    return step_pb2.WorkerFrame(result=result).SerializeToString()


def test_hashed_prompts_keep_lengths_and_equal_prefixes() -> None:
    one, same, longer = ids(*range(40)), ids(*range(40)), ids(*range(48), 9)
    redact = Redactor("hashed")
    frame = redact(Direction.PLAN, plan_frame(one, same, longer, names=bytes(16) + b"x" * 16))
    plan = step_pb2.SchedulerFrame.FromString(frame).plan
    a, b, c = (admit.prompt_token_ids for admit in plan.admit)
    assert a == b and len(a) == len(one) and len(c) == len(longer)
    assert a[:128] == c[:128] and a[128:] != c[128:160]
    assert not set(np.frombuffer(a, "<i4").tolist()) & set(range(48))
    assert (np.frombuffer(a, "<i4") >= 0).all()
    names = plan.block_names
    assert names[:16] != bytes(16) and names[:16] != names[16:] and len(names) == 32
    assert plan.kv_ops[0].block_names == names
    other = Redactor("hashed")(Direction.PLAN, plan_frame(one))
    again = step_pb2.SchedulerFrame.FromString(other).plan
    assert again.admit[0].prompt_token_ids != a  # each segment has a key of its own
    assert again.block_names[:16] != names[:16]


@pytest.mark.parametrize("privacy", ["hashed", "none"])
def test_nothing_that_tells_tokens_is_written(privacy: str) -> None:
    redact = Redactor(privacy)
    frame = redact(Direction.PLAN, plan_frame(ids(1, 2, 3)))
    admit = step_pb2.SchedulerFrame.FromString(frame).plan.admit[0]
    assert admit.request_id == "r0" and admit.sampling_params.seed == 1
    assert not admit.HasField("grammar") and b"secret" not in frame
    params = admit.sampling_params
    assert not (params.stop_token_ids or params.allowed_token_ids or params.logit_bias)
    result = step_pb2.WorkerFrame.FromString(redact(Direction.WORKER, result_frame())).result
    assert result.num_outputs == b"\1\1"
    first, second = result.token_ids[:4], result.token_ids[4:]
    if privacy == "hashed":  # equal tokens do not show: to count them would tell which they are
        assert len(second) == 4 and first != second and ids(7) not in (first, second)
    else:
        assert not first and not second
    assert not result.pooled and not result.HasField("logprobs")
    assert result.error == "RuntimeError" and not result.row_errors[0].error.message
    hello = step_pb2.Hello(held_block_ids=ids(3), held_block_names=b"n" * 16)
    hello_frame = step_pb2.WorkerFrame(hello=hello).SerializeToString()
    assert b"nnnn" not in redact(Direction.WORKER, hello_frame)


def test_none_drops_tokens_and_names() -> None:
    frame = Redactor("none")(Direction.PLAN, plan_frame(ids(1, 2, 3)))
    plan = step_pb2.SchedulerFrame.FromString(frame).plan
    admit = plan.admit[0]
    assert not admit.prompt_token_ids and not admit.output_token_ids
    assert not plan.block_names and not plan.kv_ops[0].block_names


def test_full_changes_nothing() -> None:
    frame = plan_frame(ids(1, 2, 3))
    assert Redactor("full")(Direction.PLAN, frame) is frame
