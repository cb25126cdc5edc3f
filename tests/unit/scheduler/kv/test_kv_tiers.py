"""The host tier's books: what is kept, what goes, and in which order copies run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_builders import BLOCK, IDENTITY, Clock

from quire_scheduler.kv import BlockAccountingError, HostTier, KVHandle, KVManager, Namespace
from quire_scheduler.kv.names import chain, root_of

PLAIN = Namespace()


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def names(*values: int) -> bytes:
    return b"".join(value.to_bytes(16, "little") for value in values)


def tier(num_blocks: int = 8, copy_s: float = 0.001, per_token_s: float = 1.0) -> HostTier:
    host = HostTier(num_blocks, BLOCK, copy_s, lambda first, n: n * per_token_s, Clock())
    host.limit_s = 1.0
    return host


def held(host: HostTier, *values: int) -> list[int]:
    return [v for v in values if names(v) in host]


def manager(num_blocks: int = 7, **options) -> KVManager:
    kv = KVManager(num_blocks, BLOCK, IDENTITY, clock=Clock())
    kv.host = tier(**options)
    return kv


def run(kv: KVManager, tokens: list[int], seq: int) -> KVHandle:
    """Match, load, allocate, publish and send plan `seq`."""
    data = np.array(tokens, np.int32)
    _, handle = kv.match_prefix(data, PLAIN, owner="r")
    assert kv.load_prefix(handle, data, seq)
    need = -(-len(tokens) // BLOCK) - handle.num_blocks
    assert kv.allocate_for(handle, need) is not None
    kv.publish(handle, data, seq)
    kv.take_named(seq)
    kv.check()
    return handle


def one(number: int, num_blocks: int = 3) -> list[int]:
    return [number] * (num_blocks * BLOCK) + [0]


# -- the tier alone -------------------------------------------------------------------------
def test_the_least_recently_used_content_goes_first():
    host = tier(3)
    host.offload(ids(1, 2, 3), names(1, 2, 3), 0)
    host.offload(ids(1), names(1), 0)  # seen again: no copy, but used
    host.offload(ids(4), names(4), 0)
    assert held(host, 1, 2, 3, 4) == [1, 2, 4]  # of a sequence the last block first
    assert host.stats.dropped == 1
    assert [(o.src, list(o.dst)) for o in host.take(1)] == [([3, 2, 1], [0, 1, 2]), ([4], [0])]
    host.check()


def test_where_not_all_fit_the_first_blocks_of_a_sequence_are_kept():
    host = tier(8, copy_s=0.25)  # two offloads in the second that a plan's copies may take
    host.offload(ids(1, 2, 3, 4), names(1, 2, 3, 4), 0)
    assert held(host, 1, 2, 3, 4) == [1, 2] and host.stats.lost == 2
    host.offload(ids(5), names(5), 0)
    assert not held(host, 5)
    host.take(1)
    host.offload(ids(5), names(5), 0)
    assert held(host, 5)


def test_each_way_has_half_the_limit_and_at_least_one_block():
    host = tier(8, copy_s=0.1)
    assert host.room(loads=True) == host.room(loads=False) == 5
    host.limit_s = 0.001
    assert host.room(loads=True) == host.room(loads=False) == 1
    host.offload(ids(1, 2), names(1, 2), 0)
    assert (host.room(loads=True), host.room(loads=False)) == (1, 0)


@pytest.mark.parametrize(("copy_s", "kept"), [(1.9, True), (2.1, False)])
def test_offload_pays_when_two_copies_take_less_than_computing(copy_s, kept):
    host = tier(8, copy_s=copy_s, per_token_s=4.0 / BLOCK)
    host.limit_s = 100.0
    host.offload(ids(1, 2), names(1, 2), 0)
    assert bool(held(host, 1, 2)) is kept and host.saves(0)


def test_measured_copies_correct_what_they_cost():
    host = tier(copy_s=0.001)
    for _ in range(100):
        host.observe(10, 0.05)
    assert host.copy_s == pytest.approx(0.005, rel=0.01)


def test_pinned_content_is_not_overwritten_before_it_is_loaded():
    host = tier(2)
    host.offload(ids(1, 2), names(1, 2), 0)
    host.pin([names(1), names(2)])
    host.offload(ids(3), names(3), 0)
    assert held(host, 1, 2, 3) == [1, 2] and host.stats.lost == 1
    host.load([names(1), names(2)], ids(5, 6))
    host.offload(ids(3), names(3), 0)
    assert held(host, 1, 2, 3) == [1, 3]
    assert [order.is_load for order in host.take(1)] == [False, True, False]


def test_an_order_writes_a_block_once():
    host = tier(1)
    host.offload(ids(1), names(1), 0)
    host.offload(ids(2), names(2), 0)
    orders = host.take(1)
    assert [list(order.dst) for order in orders] == [[0], [0]]
    assert orders[0].op_id < orders[1].op_id


def test_a_new_epoch_forgets_what_was_not_acknowledged():
    host = tier()
    host.offload(ids(1), names(1), 0)
    host.take(1)
    host.offload(ids(2), names(2), 0)
    host.take(2)
    host.offload(ids(3), names(3), 0)  # never sent
    host.drop_unacknowledged(1)
    assert held(host, 1, 2, 3) == [1]
    host.check()
    host.next_epoch()
    assert host.take(1) == []
    host.drop_unacknowledged(0)  # what is certain stays so in the next epoch
    assert held(host, 1) == [1]


def test_copies_that_wait_for_a_plan_wait_for_one_of_the_next_epoch():
    host = tier()
    host.offload(ids(1), names(1), 0)
    host.take(7)
    host.offload(ids(2), names(2), 0)
    host.next_epoch()  # all seven are answered
    assert [list(order.src) for order in host.take(1)] == [[2]]
    host.drop_unacknowledged(0)
    assert held(host, 1, 2) == [1]


def test_an_inventory_is_adopted_once():
    host = tier(4)
    host.offload(ids(9), names(9), 0)  # in block 0
    assert host.adopt(ids(0, 2, 2, 3, 7, -1), names(1, 2, 3, 9, 5, 6)) == 1
    assert held(host, 1, 2, 3, 9) == [2, 9]
    host.check()
    host.offload(ids(4, 5), names(4, 5), 0)
    assert sorted(host.take(1)[0].dst) == [0, 1, 3]
    host.check()


def test_a_block_of_the_host_can_be_asked():
    kv = manager()
    host = kv.host
    assert host is not None
    host.offload(ids(1), names(1), 0)
    host.pin([names(1)])
    host.load([names(1)], ids(2))
    info = kv.explain(0, "host")
    assert (info.tier, info.state, info.name, info.hits) == ("host", "cached", names(1), 1)
    assert info.age_s is not None and info.age_s > 0 and info.owners == ()
    assert kv.explain(1, "host").state == "free"
    with pytest.raises(IndexError, match="host block 8"):
        kv.explain(8, "host")


def test_lost_blocks_are_found_by_the_check():
    host = tier(3)
    host.offload(ids(1), names(1), 0)
    host._blocks[names(2)] = 0
    with pytest.raises(BlockAccountingError):
        host.check()


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from("olten"), st.integers(0, 9)), max_size=60),
)
def test_books_balance_whatever_happens(num_blocks, steps):
    host, seq = tier(num_blocks), 0
    for what, n in steps:
        if what == "o":
            host.offload(ids(n + 1, n + 2), names(n, n + 1), 0)
        elif what == "l":
            found = host.find([names(n), names(n + 1)], 2)
            host.pin(found)
            host.load(found, ids(*range(1, len(found) + 1)))
        elif what == "t":
            seq += 1
            host.take(seq)
        elif what == "e":
            host.drop_unacknowledged(max(0, seq - n))
            seq = 0
        else:
            host.adopt(ids(n % num_blocks), names(n))
        host.check()
        assert host.num_used + host.num_free == num_blocks


# -- in the manager -------------------------------------------------------------------------
def test_evicted_blocks_are_offloaded_and_loaded_by_name():
    kv = manager()
    assert kv.host is not None
    kv.release(run(kv, one(1), 1))
    kv.release(run(kv, one(2), 2))  # takes one of the three blocks, the last one
    (order,) = kv.host.take(2)
    assert not order.is_load and len(order) == 1
    kv.release(run(kv, one(3), 3))
    kv.host.take(3)
    handle = run(kv, one(1), 4)
    assert handle.num_cached_tokens == 3 * BLOCK
    offload, load, tail = kv.host.take(4)
    assert [order.is_load for order in (offload, load, tail)] == [False, True, False]
    assert list(load.dst) == handle.block_ids[3 - len(load) : 3].tolist()
    assert load.names == [kv.explain(block).name for block in load.dst]
    assert kv.stats.host_hit_tokens == len(load) * BLOCK
    assert set(offload.src) <= set(load.dst) and tail.src == [handle.block_ids[3]]


def test_a_load_that_was_not_acknowledged_is_forgotten():
    kv = manager()
    assert kv.host is not None
    for seq in (1, 2, 3):
        kv.release(run(kv, one(seq), seq))
        kv.host.take(seq)
    kv.acknowledge(3)
    handle = run(kv, one(1), 4)
    assert any(order.is_load for order in kv.host.take(4))
    assert handle.num_cached_tokens == 3 * BLOCK
    kv.reset_unacknowledged()
    kv.check()
    assert kv.peek_prefix(np.array(one(1), np.int32), PLAIN) < 3 * BLOCK
    handle = run(kv, one(1), 1)
    assert handle.num_cached_tokens == 3 * BLOCK  # what plan 2 and 3 had offloaded is there
    assert any(order.is_load for order in kv.host.take(1))


def test_a_loaded_block_is_told_with_its_copy_not_twice():
    kv = manager()
    assert kv.host is not None
    for seq in (1, 2, 3):
        kv.release(run(kv, one(seq), seq))
        kv.host.take(seq)
    handle = run(kv, one(1), 4)
    loaded = {block for order in kv.host.take(4) if order.is_load for block in order.dst}
    assert loaded
    kv.release(handle)
    assert not loaded & set(kv.take_named(5)[0].tolist())


def test_what_the_plan_being_built_writes_is_not_copied_before_it_is_written():
    kv = manager()
    assert kv.host is not None
    data = np.array(one(1), np.int32)
    _, handle = kv.match_prefix(data, PLAIN)
    kv.allocate_for(handle, 4)
    kv.publish(handle, data, 1)
    kv.release(handle)
    _, other = kv.match_prefix(np.array(one(2, 5), np.int32), PLAIN)
    kv.allocate_for(other, 6)
    assert kv.host.take(1) == []


def test_a_plan_that_may_not_load_all_says_so():
    kv = manager(num_blocks=13, copy_s=0.25)
    assert kv.host is not None
    kv.host.adopt(ids(0, 1, 2, 3), chain_of(one(7, 4)))
    data = np.array(one(7, 5), np.int32)
    _, handle = kv.match_prefix(data, PLAIN)
    assert not kv.load_prefix(handle, data, 1)
    assert handle.num_cached_tokens == 2 * BLOCK
    kv.release(handle)
    assert len(kv.host.take(1)[0]) == 2
    cached, handle = kv.match_prefix(data, PLAIN)
    assert cached == 2 * BLOCK and kv.load_prefix(handle, data, 2)
    assert handle.num_cached_tokens == 4 * BLOCK
    kv.check()


def test_after_a_restart_blocks_of_both_tiers_join_by_turns():
    kv = manager(num_blocks=13)
    assert kv.host is not None
    chain = chain_of(one(7, 6))
    part = [chain[16 * i : 16 * i + 16] for i in range(6)]
    kv.adopt_inventory(ids(3, 4, 5), part[0] + part[3] + part[4])
    kv.host.adopt(ids(1, 2, 6), part[1] + part[2] + part[5])
    data = np.array(one(7, 6), np.int32)
    cached, handle = kv.match_prefix(data, PLAIN)
    assert cached == BLOCK and kv.load_prefix(handle, data, 1)
    assert handle.num_cached_tokens == 6 * BLOCK
    assert handle.block_ids[[0, 3, 4]].tolist() == [3, 4, 5]
    assert [o.src for o in kv.host.take(1)] == [[1, 2, 6]]
    kv.check()


def chain_of(tokens: list[int]) -> bytes:
    return chain(root_of(IDENTITY, PLAIN, BLOCK), np.array(tokens, np.int32), BLOCK)
