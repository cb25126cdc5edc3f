"""BlockTables and what is done to many rows at once, against one row at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_builders import BLOCK, NS, admit, block_ids, make_kv, prompt

from quire_scheduler.kv import KVManager
from quire_scheduler.kv.tables import BlockTables, lazy_matrix


@given(st.lists(st.dictionaries(st.integers(0, 5), st.integers(1, 3)), max_size=8))
def test_appending_to_many_rows_is_appending_to_each(steps: list[dict[int, int]]) -> None:
    tables, model = BlockTables(6, 24), [[] for _ in range(6)]
    for row in range(6):
        assert tables.open(row) == row
    next_id = 1
    for step in steps:
        ids = np.arange(next_id, next_id + sum(step.values()), dtype=np.int32)
        next_id += len(ids)
        rows, counts = np.array([*step], np.intp), np.array([*step.values()], np.int32)
        tables.append(rows, counts, ids)
        left = ids.tolist()
        for row, count in step.items():
            model[row] += [left.pop(0) for _ in range(count)]
    assert [tables.of(row).tolist() for row in range(6)] == model
    assert tables.num_blocks.tolist() == [len(ids) for ids in model]


def test_a_row_is_one_request_at_a_time() -> None:
    kv = make_kv(max_requests=2)
    _, first = kv.match_prefix(prompt(4), NS, row=1)
    with pytest.raises(ValueError, match="row 1 of the block tables is taken"):
        kv.match_prefix(prompt(4), NS, row=1)
    assert kv.match_prefix(prompt(4), NS)[1].row == 0
    kv.release(first)
    assert kv.match_prefix(prompt(4), NS, row=1)[1].num_blocks == 0


def cached(kv: KVManager) -> dict[bytes, tuple[int, bytes]]:
    """All tokens up to a block's end -> its id and name."""
    found = {}
    for node in kv.tree.nodes():
        above, step = b"", node.parent
        while step is not None:
            above, step = bytes(step.key) + above, step.parent
        for i, block in enumerate(node.ids.tolist()):
            upto = above + bytes(node.key[: (i + 1) * kv.tree.block_bytes])
            found[upto] = (block, bytes(node.names[16 * i : 16 * i + 16]))
    return found


def run(requests: list[list[int]], num_outputs: int, together: bool) -> tuple[object, ...]:
    """Requests of blocks full of one token each, the last `num_outputs` of them decoded."""
    kv = make_kv(num_blocks=200, max_requests=len(requests))
    matrix = np.zeros((len(requests), 16, BLOCK), np.int32)
    for row, blocks in enumerate(requests):
        matrix[row, : len(blocks)] = np.array(blocks)[:, None]
        admit(kv, matrix[row, : len(blocks) - num_outputs].reshape(-1))
    rows = np.arange(len(requests))
    told: list[tuple[int, bytes]] = []
    for seq in range(2, 2 + num_outputs):
        assert kv.allocate_many(rows, np.ones(len(rows), np.int32)) is not None
        full = kv.tables.num_blocks[rows]
        if together:
            kv.publish_many(rows, full, matrix, seq)
        else:
            for row, blocks in enumerate(full.tolist()):
                kv.publish(kv.handles[row], matrix[row, :blocks].reshape(-1), seq)
            kv.prepare_names()
        kv.check()
        ids, names = kv.take_named(seq + 1)
        told += sorted((block, names[16 * i : 16 * i + 16]) for i, block in enumerate(ids.tolist()))
    return cached(kv), told, [kv.tables.of(row).tolist() for row in range(len(requests))]


@given(
    requests=st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=8), min_size=1, max_size=5),
    num_outputs=st.integers(1, 4),
)
def test_publishing_many_is_publishing_each(requests: list[list[int]], num_outputs: int) -> None:
    assert run(requests, num_outputs, True) == run(requests, num_outputs, False)


def test_a_name_prepared_for_a_lost_block_is_not_told() -> None:
    kv = make_kv(num_blocks=5)
    kv.release(admit(kv, prompt(16), seq=1))
    kv.prepare_names()
    again = admit(kv, prompt(16, first=100), seq=1)  # the same blocks, other content, same plan
    kv.prepare_names()
    kv.check()
    ids, names = kv.take_named(2)
    assert sorted(ids.tolist()) == sorted(again.block_ids.tolist())
    assert len(names) == 16 * len(ids) and len(set(ids.tolist())) == len(ids)
    for i, block in enumerate(ids.tolist()):
        assert kv.explain(block).name == names[16 * i : 16 * i + 16]


def test_names_are_told_only_when_prepared() -> None:
    kv = make_kv()
    admit(kv, prompt(8), seq=1)
    assert len(kv.take_named(2)[0]) == 0
    kv.prepare_names()
    assert len(kv.take_named(3)[0]) == 2


def test_allocating_for_a_dead_row_is_refused() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(8))
    row = handle.row
    kv.release(handle)
    with pytest.raises(ValueError, match="no live handle"):
        kv.allocate_many(np.array([row]), block_ids(1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_lazy_matrix_takes_only_the_pages_it_is_written_to() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    matrix = lazy_matrix(10_000, 32_768)
    matrix[:500, 0] = 7
    assert resident() - before < 16 << 20
    assert matrix[:500, 0].sum() == 3500 and not matrix[500:510, :].any()
