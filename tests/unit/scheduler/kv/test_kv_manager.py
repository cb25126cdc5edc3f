"""KVManager: what the engine relies on from admission to release."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kv_builders import BLOCK, NS, ROOT, admit, make_kv, prompt, take_named

from quire_scheduler.kv import BlockAccountingError, Namespace
from quire_scheduler.kv.names import chain


def test_unknown_prompt_hits_nothing() -> None:
    kv = make_kv()
    num_cached, handle = kv.match_prefix(prompt(9), NS)
    assert num_cached == 0 and handle.num_blocks == 0
    kv.check()


def test_second_request_gets_the_published_blocks() -> None:
    kv = make_kv()
    first = admit(kv, prompt(10))
    num_cached, second = kv.match_prefix(prompt(10), NS)
    assert num_cached == 8
    assert second.block_ids.tolist() == first.block_ids[:2].tolist()
    kv.check()


@pytest.mark.parametrize(("length", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_the_last_token_is_left_to_compute(length: int, cached: int) -> None:
    kv = make_kv()
    admit(kv, prompt(16))
    assert kv.match_prefix(prompt(length), NS)[0] == cached
    assert kv.peek_prefix(prompt(length), NS) == cached


def test_partial_block_is_not_published() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(7))
    assert handle.num_published == 1
    assert kv.peek_prefix(prompt(9), NS) == 4


def test_chunks_are_published_as_they_are_sent() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(16), NS)
    kv.allocate_for(handle, 4)
    assert kv.publish(handle, prompt(16)[:6], 1) == 1
    assert kv.peek_prefix(prompt(17), NS) == 4
    assert kv.publish(handle, prompt(16)[:16], 2) == 3
    assert kv.peek_prefix(prompt(17), NS) == 16


def test_released_blocks_stay_cached_and_hit() -> None:
    kv = make_kv()
    kv.release(admit(kv, prompt(10)))
    assert (kv.num_free, kv.num_cached, kv.num_used) == (14, 2, 0)
    assert kv.match_prefix(prompt(10), NS)[0] == 8
    kv.check()


def test_namespaces_are_isolated() -> None:
    kv = make_kv()
    admit(kv, prompt(10))
    assert kv.match_prefix(prompt(10), Namespace(salt=b"other"))[0] == 0
    assert kv.match_prefix(prompt(10), Namespace(adapter=b"lora"))[0] == 0


def test_a_one_time_namespace_leaves_nothing_behind() -> None:
    kv = make_kv()
    for i in range(50):
        kv.release(kv.match_prefix(prompt(10), Namespace(salt=b"%d" % i))[1])
    assert not kv.tree.roots


def test_duplicate_blocks_stay_private() -> None:
    kv = make_kv()
    _, late = kv.match_prefix(prompt(10), NS)
    kv.allocate_for(late, 3)
    first = admit(kv, prompt(10))
    table = late.block_ids.tolist()
    assert kv.publish(late, prompt(10), 1) == 0
    assert late.block_ids.tolist() == table
    assert kv.match_prefix(prompt(10), NS)[1].block_ids.tolist() == first.block_ids[:2].tolist()
    kv.check()
    kv.release(late)
    kv.release(first)
    kv.check()


def test_request_with_duplicates_still_publishes_its_own_continuation() -> None:
    kv = make_kv()
    _, late = kv.match_prefix(prompt(8), NS)
    kv.allocate_for(late, 3)
    admit(kv, prompt(8))
    kv.publish(late, prompt(8), 1)
    assert kv.publish(late, prompt(12), 2) == 1
    assert kv.peek_prefix(prompt(13), NS) == 12
    kv.check()


def test_recomputed_last_block_takes_the_place_of_the_idle_one() -> None:
    kv = make_kv()
    kv.release(admit(kv, prompt(8)))
    again = admit(kv, prompt(8))
    assert (kv.num_used, kv.num_cached) == (2, 0)
    kv.release(again)
    assert (kv.num_free, kv.num_cached) == (14, 2)
    kv.check()


def test_allocation_evicts_cached_blocks() -> None:
    kv = make_kv(num_blocks=5)
    kv.release(admit(kv, prompt(16)))
    assert (kv.num_free, kv.num_cached) == (0, 4)
    _, handle = kv.match_prefix(prompt(12, first=100), NS)
    assert kv.allocate_for(handle, 3) is not None
    assert kv.stats.evicted_blocks == 3
    assert kv.peek_prefix(prompt(17), NS) == 4
    kv.check()


def test_refused_allocation_changes_nothing() -> None:
    kv = make_kv(num_blocks=5)
    kv.release(admit(kv, prompt(8)))
    _, handle = kv.match_prefix(prompt(9), NS)
    assert kv.num_allocatable == 2
    assert kv.allocate_for(handle, 3) is None
    assert handle.num_blocks == 2 and kv.stats.evicted_blocks == 0
    kv.release(handle)
    assert kv.num_allocatable == kv.num_usable == 4
    kv.check()


def test_allocate_many_is_all_or_nothing() -> None:
    kv = make_kv(num_blocks=6)
    handles = [kv.match_prefix(prompt(4, first=100 * i), NS)[1] for i in range(3)]
    rows = np.array([handle.row for handle in handles])
    assert kv.allocate_many(rows, np.array([2, 2, 2], np.int32)) is None
    assert [handle.num_blocks for handle in handles] == [0, 0, 0]
    ids = kv.allocate_many(rows[[0, 2]], np.array([2, 3], np.int32))
    assert ids is not None
    assert ids.tolist() == [b for handle in handles for b in handle.block_ids.tolist()]
    assert [handle.num_blocks for handle in handles] == [2, 0, 3]
    kv.check()


def test_preempted_request_finds_its_own_blocks_again() -> None:
    kv = make_kv()
    kv.release(admit(kv, prompt(11)))
    num_cached, _ = kv.match_prefix(prompt(11), NS)
    assert num_cached == 8


def test_cancel_returns_blocks() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(30), NS)
    kv.allocate_for(handle, 8)
    kv.release(handle)
    assert kv.num_free == kv.num_usable
    kv.release(handle)  # a second door is no harm
    assert kv.num_free == kv.num_usable


def test_dead_handle_cannot_allocate_or_publish() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(8), owner="r1")
    kv.release(handle)
    with pytest.raises(ValueError, match="'r1' is dead: match the request anew"):
        kv.allocate_for(handle, 1)
    with pytest.raises(ValueError, match="is dead"):
        kv.publish(handle, prompt(8), 1)


def test_publishing_more_than_the_table_holds_is_refused() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(8), NS, owner="r1")
    kv.allocate_for(handle, 1)
    with pytest.raises(ValueError, match=r"8 tokens fill 2 blocks but r1 has 1"):
        kv.publish(handle, prompt(8), 1)
    kv.check()


def test_fenced_blocks_come_back_with_their_result() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(10))
    kv.release(handle, fence_seq=3)
    assert (kv.num_fenced, kv.num_cached, kv.num_free) == (3, 0, 13)
    assert kv.num_allocatable == 13
    kv.check()
    kv.acknowledge(2)
    assert kv.num_fenced == 3
    kv.acknowledge(3)
    assert (kv.num_fenced, kv.num_cached, kv.num_free) == (0, 2, 14)
    kv.check()


def test_fenced_cached_block_can_be_hit_but_not_handed_out() -> None:
    kv = make_kv(num_blocks=5)
    first = admit(kv, prompt(8))
    ids = first.block_ids.tolist()
    kv.release(first, fence_seq=3)
    num_cached, handle = kv.match_prefix(prompt(9), NS)
    assert num_cached == 8 and handle.block_ids.tolist() == ids
    kv.release(handle)
    _, other = kv.match_prefix(prompt(8, first=50), NS)
    assert kv.allocate_for(other, 3) is None
    taken = kv.allocate_for(other, 2)
    assert taken is not None and not set(ids) & set(taken.tolist())
    kv.check()


def test_names_are_the_content_chain() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(10), seq=1)
    ids, names = take_named(kv, 2)
    assert ids.tolist() == handle.block_ids[:2].tolist()
    assert names == chain(ROOT, prompt(10), BLOCK)


def test_a_name_is_told_once() -> None:
    kv = make_kv()
    admit(kv, prompt(10), seq=1)
    assert len(take_named(kv, 2)[0]) == 2
    ids, names = take_named(kv, 3)
    assert len(ids) == 0 and names == b""


def test_blocks_of_the_plan_itself_are_not_named_in_it() -> None:
    kv = make_kv()
    admit(kv, prompt(10), seq=4)
    assert len(take_named(kv, 4)[0]) == 0
    kv.check()
    assert len(take_named(kv, 5)[0]) == 2


def test_evicted_block_is_not_named_for_its_old_content() -> None:
    kv = make_kv(num_blocks=5)
    kv.release(admit(kv, prompt(16), seq=1))
    _, handle = kv.match_prefix(prompt(12, first=100), NS)
    taken = kv.allocate_for(handle, 3)
    assert taken is not None
    ids, _ = take_named(kv, 2)
    assert not set(ids.tolist()) & set(taken.tolist())


def test_names_survive_splits_between_publishing_and_naming() -> None:
    kv = make_kv()
    admit(kv, prompt(16), seq=1)
    other = np.concatenate((prompt(8), prompt(8, first=70)))
    admit(kv, other, seq=1)
    ids, names = take_named(kv, 2)
    told = {int(b): names[16 * i : 16 * i + 16] for i, b in enumerate(ids)}
    for toks in (prompt(16), other):
        _, handle = kv.match_prefix(np.append(toks, 0).astype(np.int32), NS)
        expected = chain(ROOT, toks, BLOCK)
        assert b"".join(told[b] for b in handle.block_ids.tolist()) == expected


def test_a_growing_node_is_named_as_it_grows() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(16), NS)
    kv.allocate_for(handle, 4)
    told = b""
    for seq in (1, 2, 3, 4):
        kv.publish(handle, prompt(16)[: 4 * seq], seq)
        told += take_named(kv, seq + 1)[1]
    assert told == chain(ROOT, prompt(16), BLOCK)


def test_names_follow_their_blocks_through_splits_and_cuts() -> None:
    kv = make_kv(num_blocks=7)
    kv.release(admit(kv, prompt(20), seq=1))
    take_named(kv, 2)
    expected = chain(ROOT, prompt(20), BLOCK)
    _, handle = kv.match_prefix(np.append(prompt(8), prompt(4, first=50)), NS)  # splits
    kv.allocate_for(handle, 2)  # cuts one block
    kv.check()
    _, other = kv.match_prefix(prompt(17), NS)
    for i, block in enumerate(other.block_ids.tolist()):
        assert kv.explain(block).name == expected[16 * i : 16 * i + 16]
    assert other.num_blocks == 4


def test_replaced_block_gives_its_name_to_the_new_one() -> None:
    kv = make_kv()
    kv.release(admit(kv, prompt(8), seq=1))
    take_named(kv, 2)
    again = admit(kv, prompt(8), seq=2)
    kv.check()
    ids, names = take_named(kv, 3)
    assert ids.tolist() == again.block_ids[1:].tolist()
    assert names == chain(ROOT, prompt(8), BLOCK)[16:]


def test_names_for_an_answered_plan_are_refused() -> None:
    kv = make_kv()
    kv.acknowledge(3)
    with pytest.raises(ValueError, match="plan 3 was answered already"):
        take_named(kv, 3)


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = make_kv(enable_prefix_caching=False)
    handle = admit(kv, prompt(10))
    kv.release(handle)
    assert kv.num_free == kv.num_usable
    assert kv.match_prefix(prompt(10), NS)[0] == kv.peek_prefix(prompt(10), NS) == 0
    assert kv.adopt_inventory(np.array([3], np.int32), b"n" * 16) == 0
    assert kv.stats.queries == 0
    kv.check()


def test_bypassing_request_hits_nothing_but_others_may_use_its_blocks() -> None:
    kv = make_kv()
    first = admit(kv, prompt(8))
    num_cached, handle = kv.match_prefix(prompt(12), NS, use_cache=False)
    assert num_cached == 0
    kv.allocate_for(handle, 3)
    assert kv.publish(handle, prompt(12), 1) == 1
    assert kv.peek_prefix(prompt(13), NS) == 12
    kv.release(first)
    kv.release(handle)
    kv.check()


def test_stats_count_an_admission_once_whatever_the_retries() -> None:
    kv = make_kv(num_blocks=5)
    holder = admit(kv, prompt(8))
    for _ in range(3):
        _, waiting = kv.match_prefix(prompt(20), NS)
        assert kv.allocate_for(waiting, 3) is None
        kv.release(waiting)
    assert kv.stats.queries == 1
    kv.release(holder)
    _, handle = kv.match_prefix(prompt(16), NS)
    kv.allocate_for(handle, 1)
    kv.allocate_for(handle, 1)
    assert (kv.stats.queries, kv.stats.query_tokens, kv.stats.hit_tokens) == (2, 24, 8)


def test_usage_is_the_share_of_used_blocks() -> None:
    kv = make_kv(num_blocks=9)
    admit(kv, prompt(8))
    assert kv.usage == 0.25


def test_explain_tells_owner_age_hits_and_name() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(10), owner="chat-1")
    kv.match_prefix(prompt(10), NS, owner="chat-2")
    take_named(kv, 2)
    shared, private = int(handle.block_ids[0]), int(handle.block_ids[2])
    info = kv.explain(shared)
    assert info.state == "used" and info.tier == "device"
    assert set(info.owners) == {"chat-1", "chat-2"}
    assert info.hits == 1 and info.age_s is not None and info.age_s > 0
    assert info.name == chain(ROOT, prompt(4), BLOCK)
    assert kv.explain(private).name is None and kv.explain(private).age_s is None
    assert kv.explain(0).state == "null" and kv.explain(16).state == "free"
    kv.release(handle, fence_seq=9)
    assert kv.explain(private).state == "fenced"
    with pytest.raises(IndexError, match="the pool has 17"):
        kv.explain(17)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kv, h: kv.pool.retain(h.block_ids[2:3]), "has 2 holders, 1 are known"),
        (lambda kv, h: kv.pool.unkeep(h.block_ids[:1]), "disagree on keeping"),
        (lambda kv, h: setattr(h.node, "ref", 2), "counts 2 locks, has 1"),
        (lambda kv, h: kv.tree.unnamed.clear(), "never be told"),
        (lambda kv, h: kv.index.add(b"x", int(h.block_ids[0])), "twice"),
    ],
)
def test_check_says_what_is_wrong(damage: Any, message: str) -> None:
    kv = make_kv()
    handle = admit(kv, prompt(10))
    kv.check()
    damage(kv, handle)
    with pytest.raises(BlockAccountingError, match=message):
        kv.check()
