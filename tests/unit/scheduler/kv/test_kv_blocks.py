"""BlockPool: every block is free, used, cached or fenced, and never two of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_scheduler.kv.blocks import BlockAccountingError, BlockPool


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, np.int32)


def counts(pool: BlockPool) -> tuple[int, int, int, int]:
    pool.check()
    return pool.num_free, pool.num_fenced, pool.num_cached, pool.num_used


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(8)
    taken = pool.allocate(7)
    assert taken is not None and sorted(taken.tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert taken.dtype == np.int32


def test_allocate_beyond_free_changes_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4) is None
    assert counts(pool) == (3, 0, 0, 0)


def test_a_pool_without_usable_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 2"):
        BlockPool(1)


def test_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(2)
    assert taken is not None
    pool.retain(taken)
    pool.release(taken)
    assert counts(pool) == (1, 0, 0, 2)
    pool.release(taken)
    assert counts(pool) == (3, 0, 0, 0)


def test_kept_block_is_cached_and_taken_back_by_a_hit() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(2)
    assert taken is not None
    pool.keep(taken)
    pool.release(taken)
    assert counts(pool) == (1, 0, 2, 0)
    pool.retain(taken[:1])
    assert counts(pool) == (1, 0, 1, 1)
    pool.unkeep(taken)
    assert counts(pool) == (2, 0, 0, 1)


def test_take_unlinks_from_the_middle_of_the_free_stack() -> None:
    pool = BlockPool(8)
    pool.take(ids(3, 6))
    assert counts(pool) == (5, 0, 2, 0)
    rest = pool.allocate(5)
    assert rest is not None and sorted(rest.tolist()) == [1, 2, 4, 5, 7]


def test_fenced_blocks_wait_for_their_plan() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(3)
    assert taken is not None
    pool.fence(taken[:1], 5)
    pool.fence(taken[1:], 7)
    assert counts(pool) == (0, 3, 0, 0)
    pool.pass_fence(4)
    assert counts(pool) == (0, 3, 0, 0)
    pool.pass_fence(6)
    assert counts(pool) == (1, 2, 0, 0)
    pool.pass_fence(7)
    assert counts(pool) == (3, 0, 0, 0)


def test_fence_behind_a_later_one_waits_for_it() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None and second is not None
    pool.fence(first, 9)
    pool.fence(second, 3)
    pool.pass_fence(8)
    assert counts(pool) == (1, 2, 0, 0)


def test_block_held_beside_its_fence_counts_as_used() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(1)
    assert taken is not None
    pool.retain(taken)
    pool.fence(taken, 2)
    assert counts(pool) == (2, 0, 0, 1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda pool: pool.release(ids(2)), "block 2 is released but nobody holds it"),
        (lambda pool: pool.retain(ids(2)), "block 2 is retained but nobody keeps it"),
        (lambda pool: pool.keep(ids(2)), "block 2 is to be kept but nobody holds it"),
        (lambda pool: pool.unkeep(ids(2)), "block 2 is dropped but it was not kept"),
    ],
)
def test_misuse_is_named_and_changes_nothing(act, message) -> None:
    pool = BlockPool(4)
    with pytest.raises(BlockAccountingError, match=message):
        act(pool)
    assert counts(pool) == (3, 0, 0, 0)


def test_taking_a_held_block_is_refused() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(1)
    assert taken is not None
    with pytest.raises(BlockAccountingError, match="taken but it is not free"):
        pool.take(taken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool.refs.__setitem__(0, 1), "null block"),
        (lambda pool: pool.refs.__setitem__(1, 1), "block 1 is free but held"),
        (lambda pool: pool.kept.__setitem__(2, True), "block 2 is free but held or kept"),
        (lambda pool: pool.fence_refs.__setitem__(3, 1), "fence counts differ"),
        (lambda pool: setattr(pool, "num_cached", 1), "1 blocks counted cached, 0 are"),
    ],
)
def test_check_says_what_is_wrong(damage, message) -> None:
    pool = BlockPool(6)
    damage(pool)
    with pytest.raises(BlockAccountingError, match=message):
        pool.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_use_balances(data: st.DataObject) -> None:
    pool = BlockPool(12)
    held: list[np.ndarray] = []
    seq = 0
    for _ in range(data.draw(st.integers(1, 25))):
        op = data.draw(st.sampled_from(["allocate", "retain", "keep", "release", "fence", "pass"]))
        if op == "allocate":
            taken = pool.allocate(data.draw(st.integers(0, 5)))
            if taken is not None:
                held.append(taken)
        elif op == "pass":
            pool.pass_fence(data.draw(st.integers(0, seq)))
        elif held:
            some = held[data.draw(st.integers(0, len(held) - 1))]
            if op == "retain":
                pool.retain(some)
                held.append(some)
            elif op == "keep":
                pool.keep(some)
            else:
                held = [other for other in held if other is not some] + [some] * (
                    sum(other is some for other in held) - 1
                )
                if op == "release":
                    pool.release(some)
                else:
                    seq += 1
                    pool.fence(some, seq)
        pool.check()
    pool.pass_fence(seq)
    for some in held:
        pool.release(some)
    pool.check()
    assert pool.num_used == pool.num_fenced == 0
