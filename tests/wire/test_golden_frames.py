"""The bytes of every message are pinned: a change of the wire is always on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import frames
import numpy as np

from quire.v1 import engine_pb2, step_pb2
from quire.wire import PROTOCOL_VERSION

ALL = frames.frames()


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_golden_file(name):
    golden = (frames.GOLDEN / f"{name}.bin").read_bytes()
    assert frames.encode(ALL[name]) == golden, (
        f"the wire form of {name} changed; if that is meant, run tests/wire/frames.py"
    )


@pytest.mark.parametrize("name", ALL)
def test_golden_bytes_read_back_as_the_message(name):
    golden = (frames.GOLDEN / f"{name}.bin").read_bytes()
    assert type(ALL[name]).FromString(golden) == ALL[name]


def test_no_golden_file_is_left_over():
    assert {p.stem for p in frames.GOLDEN.glob("*.bin")} == set(ALL)


def test_every_kind_of_frame_has_an_example():
    for kind in (step_pb2.WorkerFrame, step_pb2.SchedulerFrame, engine_pb2.AttachRequest):
        shown = {m.WhichOneof("message") for m in ALL.values() if isinstance(m, kind)}
        assert shown == {f.name for f in kind.DESCRIPTOR.oneofs_by_name["message"].fields}


def test_columns_are_little_endian_and_a_decode_row_is_nine_bytes():
    plan = ALL["plan_decode"].plan
    assert plan.slots == b"\x00\x00\x00\x00\x03\x00\x00\x00"
    assert np.frombuffer(plan.num_tokens, "<i4").tolist() == [1, 1]
    assert len(plan.slots) + len(plan.num_tokens) + len(plan.flags) == 2 * 9


def test_the_protocol_version_is_the_one_pinned():
    assert PROTOCOL_VERSION == 1


def test_the_numbers_of_flags_statuses_and_reasons_are_pinned():
    assert dict(step_pb2.RowFlag.items()) == {
        "ROW_FLAG_UNSPECIFIED": 0,
        "ROW_FLAG_SAMPLE": 1,
        "ROW_FLAG_LOGPROBS": 2,
        "ROW_FLAG_VERIFY": 4,
        "ROW_FLAG_POOL": 8,
    }
    assert step_pb2.STEP_STATUS_OK == 1 and step_pb2.STEP_STATUS_REFUSED == 3


def test_the_scheduler_writes_the_form_shown_here():
    """The builder's column layout is the engine's own, not a story about it."""
    from quire_scheduler.plan import Plan

    plan = Plan(
        epoch=4,
        seq=18,
        slots=np.array([0, 3], np.int32),
        num_tokens=np.array([1, 1], np.int32),
        flags=np.array([1, 3], np.uint8),
        new_block_rows=np.array([3], np.int32),
        new_block_ids=np.array([77], np.int32),
    )
    message = plan.frame(0.0, 60_000)
    assert frames.encode(message) == frames.encode(ALL["plan_decode"])
