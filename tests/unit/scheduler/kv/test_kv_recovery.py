"""New epochs and restarts: nothing doubtful is served, nothing certain is lost."""

from __future__ import annotations

import numpy as np
import pytest
from kv_builders import BLOCK, NS, ROOT, admit, block_ids, make_kv, prompt, take_named

from quire_scheduler.kv import Namespace
from quire_scheduler.kv.names import chain


def test_new_epoch_keeps_acknowledged_blocks_and_drops_the_rest() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(16), NS)
    kv.allocate_for(handle, 4)
    kv.publish(handle, prompt(16)[:8], 1)
    kv.publish(handle, prompt(16), 2)
    kv.acknowledge(1)
    kv.reset_unacknowledged()
    kv.check()
    assert kv.peek_prefix(prompt(17), NS) == 8
    assert (kv.num_cached, kv.num_used) == (2, 0)


def test_new_epoch_drops_what_follows_a_doubtful_block() -> None:
    kv = make_kv()
    _, handle = kv.match_prefix(prompt(8), NS)
    kv.allocate_for(handle, 2)
    kv.publish(handle, prompt(4), 5)
    kv.acknowledge(4)
    kv.publish(handle, prompt(8), 3)
    other = np.concatenate((prompt(4), prompt(4, first=50)))
    admit(kv, other, seq=3)
    kv.reset_unacknowledged()
    kv.check()
    assert kv.num_free == kv.num_usable


def test_handles_die_with_their_epoch() -> None:
    kv = make_kv()
    handle = admit(kv, prompt(8))
    kv.reset_unacknowledged()
    assert not handle.live
    kv.release(handle)
    with pytest.raises(ValueError, match="match the request anew"):
        kv.allocate_for(handle, 1)
    kv.check()


def test_names_lost_with_their_plan_are_told_again() -> None:
    kv = make_kv()
    admit(kv, prompt(10), seq=1)
    first = take_named(kv, 2)
    kv.acknowledge(1)
    kv.reset_unacknowledged()
    again = take_named(kv, 1)
    assert again[0].tolist() == first[0].tolist() and again[1] == first[1]


def test_names_that_arrived_are_not_told_again() -> None:
    kv = make_kv()
    admit(kv, prompt(10), seq=1)
    take_named(kv, 2)
    kv.acknowledge(2)
    kv.reset_unacknowledged()
    assert len(take_named(kv, 1)[0]) == 0


def test_fences_of_the_old_epoch_wait_for_the_first_new_plan() -> None:
    kv = make_kv()
    kv.acknowledge(7)
    kv.release(admit(kv, prompt(3)), fence_seq=9)
    kv.reset_unacknowledged()
    assert kv.num_fenced == 1
    kv.check()
    kv.acknowledge(1)
    assert kv.num_fenced == 0 and kv.num_free == kv.num_usable


def test_plans_of_the_new_epoch_are_not_certain_by_the_old_count() -> None:
    kv = make_kv()
    kv.acknowledge(50)
    kv.reset_unacknowledged()
    admit(kv, prompt(8), seq=1)
    kv.reset_unacknowledged()
    assert kv.peek_prefix(prompt(9), NS) == 0


def test_lost_worker_leaves_an_empty_pool() -> None:
    kv = make_kv()
    admit(kv, prompt(8))
    kv.adopt_inventory(block_ids(9), b"n" * 16)
    kv.acknowledge(1)
    kv.reset_all()
    kv.check()
    assert kv.num_free == kv.num_usable and kv.peek_prefix(prompt(9), NS) == 0
    assert kv.stats.queries == 1


def test_adopted_names_are_found_by_content() -> None:
    kv = make_kv()
    assert kv.adopt_inventory(block_ids(9, 4, 7), chain(ROOT, prompt(12), BLOCK)) == 3
    assert kv.num_cached == 3 and kv.num_allocatable == kv.num_usable
    num_cached, handle = kv.match_prefix(prompt(20), NS)
    assert num_cached == 12 and handle.block_ids.tolist() == [9, 4, 7]
    assert kv.stats.grafted_blocks == 3
    kv.check()


def test_grafted_blocks_are_in_the_tree_and_named_already() -> None:
    kv = make_kv()
    kv.adopt_inventory(block_ids(9, 4), chain(ROOT, prompt(8), BLOCK))
    kv.release(kv.match_prefix(prompt(9), NS)[1])
    assert kv.peek_prefix(prompt(9), NS) == 8
    assert len(take_named(kv, 1)[0]) == 0
    kv.check()


def test_block_adopted_after_a_lost_reuse_counts_as_named() -> None:
    kv = make_kv(num_blocks=3)
    kv.release(admit(kv, prompt(8), seq=1))  # never told, and lost with its plan
    kv.reset_unacknowledged()
    kv.adopt_inventory(block_ids(1, 2), chain(ROOT, prompt(8, first=50), BLOCK))
    assert kv.match_prefix(prompt(9, first=50), NS)[0] == 8
    kv.check()
    assert len(take_named(kv, 1)[0]) == 0


def test_grafting_goes_on_where_the_tree_ends() -> None:
    kv = make_kv()
    names = chain(ROOT, prompt(16), BLOCK)
    kv.release(admit(kv, prompt(8)))
    kv.adopt_inventory(block_ids(9, 4), names[32:])
    num_cached, handle = kv.match_prefix(prompt(17), NS)
    assert num_cached == 16 and handle.block_ids[2:].tolist() == [9, 4]
    told, _ = take_named(kv, 2)
    assert sorted(told.tolist()) == sorted(handle.block_ids[:2].tolist())
    kv.check()


def test_grafting_leaves_the_last_token_to_compute() -> None:
    kv = make_kv()
    kv.adopt_inventory(block_ids(9, 4), chain(ROOT, prompt(8), BLOCK))
    assert kv.match_prefix(prompt(8), NS)[0] == 4
    kv.check()


def test_a_gap_in_the_inventory_ends_the_match() -> None:
    kv = make_kv()
    names = chain(ROOT, prompt(12), BLOCK)
    kv.adopt_inventory(block_ids(9, 7), names[:16] + names[32:])
    assert kv.match_prefix(prompt(13), NS)[0] == 4
    kv.check()


def test_another_namespace_does_not_hit_by_name() -> None:
    kv = make_kv()
    kv.adopt_inventory(block_ids(9), chain(ROOT, prompt(4), BLOCK))
    assert kv.match_prefix(prompt(8), Namespace(salt=b"x"))[0] == 0


def test_inventory_passes_over_what_it_cannot_adopt() -> None:
    kv = make_kv()
    held = int(admit(kv, prompt(4)).block_ids[0])
    names = b"".join(bytes([i]) * 16 for i in (1, 2, 3, 4, 5, 6, 5))
    assert kv.adopt_inventory(block_ids(0, held, 17, -1, 9, 9, 8), names) == 1
    kv.check()
    assert kv.adopt_inventory(block_ids(9), b"z" * 16) == 0


def test_inventory_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks come with 16 bytes of names"):
        make_kv().adopt_inventory(block_ids(1, 2), b"x" * 16)


def test_blocks_known_by_name_only_are_evicted_first() -> None:
    kv = make_kv(num_blocks=7)
    kv.release(admit(kv, prompt(8)))
    kv.adopt_inventory(block_ids(5, 6), b"a" * 16 + b"b" * 16)
    _, handle = kv.match_prefix(prompt(16, first=50), NS)
    taken = kv.allocate_for(handle, 4)
    assert taken is not None and {5, 6} <= set(taken.tolist())
    assert kv.peek_prefix(prompt(9), NS) == 8
    kv.check()


def test_evicted_name_no_longer_hits() -> None:
    kv = make_kv(num_blocks=3)
    kv.adopt_inventory(block_ids(1, 2), chain(ROOT, prompt(8), BLOCK))
    _, handle = kv.match_prefix(prompt(8, first=50), NS)
    assert kv.allocate_for(handle, 2) is not None
    kv.release(handle)
    assert kv.match_prefix(prompt(9), NS)[0] == 0
    kv.check()
