"""What a result does to all rows at once, against one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.v1 import step_pb2
from quire_scheduler import results
from quire_scheduler.columns import Columns
from quire_scheduler.outputs import LENGTH, STOP, UNFINISHED, Logprobs, Outputs
from quire_scheduler.plan import Plan

VOCAB = 50
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, VOCAB - 1), st.booleans()), max_size=12
)  # tokens yielded, the token, finished


def plan_of(num_rows: int) -> Plan:
    slots = np.arange(num_rows) * 3
    flags = np.full(num_rows, step_pb2.ROW_FLAG_SAMPLE, np.uint8)
    return Plan(1, 1, slots=slots, flags=flags, num_sampled=num_rows)


def result_of(slots: list[int], rows: list[tuple[int, int, bool]]) -> step_pb2.StepResult:
    return step_pb2.StepResult(
        slots=np.array(slots, "<i4").tobytes(),
        num_outputs=bytes(n for n, _, _ in rows),
        token_ids=np.array([t for n, t, _ in rows if n], "<i4").tobytes(),
        finished=bytes(int(f) for _, _, f in rows),
    )


@given(ROWS, st.randoms())
def test_rows_are_read_in_any_order(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    slots = [3 * i for i in order]
    read = results.read(result_of(slots, [rows[i] for i in order]), plan_of(len(rows)), VOCAB)
    expected = [(3 * i, rows[i][1], rows[i][2]) for i in order if rows[i][0]]
    got = zip(read.slots.tolist(), read.token_ids.tolist(), read.stopped.tolist(), strict=True)
    assert list(got) == expected
    assert read.silent.tolist() == [3 * i for i in order if not rows[i][0]]


@pytest.mark.parametrize(
    "damage",
    [
        {"slots": np.array([0, 4], "<i4").tobytes()},
        {"slots": np.array([0], "<i4").tobytes()},
        {"slots": b"\0\0\0"},
        {"num_outputs": b"\1\2"},
        {"num_outputs": b"\1\1\1"},
        {"num_outputs": b"\1\0"},
        {"token_ids": np.array([5], "<i4").tobytes()},
        {"token_ids": np.array([5, VOCAB], "<i4").tobytes()},
        {"token_ids": np.array([-1, 5], "<i4").tobytes()},
        {"finished": b"\0"},
    ],
)
def test_a_result_that_does_not_answer_its_plan_is_refused(damage):
    result = result_of([0, 3], [(1, 5, False), (1, 6, False)])
    for name, value in damage.items():
        setattr(result, name, value)
    with pytest.raises(results.ResultError):
        results.read(result, plan_of(2), VOCAB)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8))
def test_a_stop_comes_before_the_length(ends):
    full, stopped = np.array(ends, np.bool_).reshape(-1, 2).T
    tokens = np.arange(len(ends), dtype=np.int32) + 7
    reasons, stop_ids, ending = results._endings(full, stopped, tokens)
    assert ending == [i for i, end in enumerate(ends) if any(end)]
    assert reasons.tolist() == [STOP if s else LENGTH if f else UNFINISHED for f, s in ends]
    assert stop_ids.tolist() == [7 + i if s else -1 for i, (_, s) in enumerate(ends)]


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 70_000]), st.integers(0, 2)), min_size=1))
def test_each_client_gets_its_rows_in_order(rows):
    clients = np.array([client for client, _ in rows], np.int32)
    counts = np.array([count for _, count in rows], np.uint32)
    n = len(rows)
    column = np.arange(n, dtype=np.int32)
    entries = np.repeat(column, counts)
    logprobs = Logprobs(counts, entries, entries.astype(np.float32), column.astype(np.uint32))
    unsigned = column.astype(np.uint32)
    outputs = Outputs(
        unsigned, unsigned, unsigned, np.ones(n, np.uint32), column, column.astype(np.uint8),
        column, unsigned, unsigned, logprobs,
    )  # fmt: skip
    parts = dict(results.split(outputs, clients))
    assert set(parts) == set(clients.tolist())
    for client, part in parts.items():
        mine = [i for i, (owner, _) in enumerate(rows) if owner == client]
        for name in ("handles", "attempts", "first_indices", "token_ids", "deaths"):
            assert getattr(part, name).tolist() == mine
        assert part.logprobs is not None
        assert part.logprobs.token_ids.tolist() == [i for i in mine for _ in range(counts[i])]


@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6), max_size=10))
def test_appended_tokens_are_there_when_somebody_looks(steps):
    columns, model = Columns(6, 16, 4), [[] for _ in range(6)]
    for number, slots in enumerate(steps):
        at = columns.num_tokens[slots]
        tokens = np.arange(len(slots), dtype=np.int32) + 10 * number
        columns.append_tokens(np.array(slots, np.intp), at, tokens, at + 1)
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            model[slot].append(token)
        if number % 3 == 0:
            columns.token_ids  # noqa: B018 - looking stores
    for slot in range(6):
        assert columns.token_ids[slot, : columns.num_tokens[slot]].tolist() == model[slot]
    assert columns.token_blocks.reshape(6, -1).tolist() == columns.token_ids.tolist()
