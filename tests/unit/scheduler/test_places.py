"""Who is let in, in which order, and that nobody who is in starves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_helpers import Collector, Rig

from fakes.worker import Options
from quire.step_cost import StepCostModel
from quire_scheduler.columns import Columns
from quire_scheduler.preemption import pick_victim
from quire_scheduler.shares import hand_out


class Order(Collector):
    """Remembers in which order requests ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[int] = []

    def deliver(self, outputs) -> None:
        super().deliver(outputs)
        self.ended += outputs.handles[outputs.finish_reasons != 0].tolist()


def order_of(priorities: list[int], policy: str) -> list[int]:
    """In which order requests of these priorities run, one at a time, behind another."""
    rig = Rig(max_num_seqs=1, scheduling_policy=policy)
    rig.client = Order()
    rig.submit([3], max_tokens=3, handle=99)
    rig.turn()
    for i, priority in enumerate(priorities):
        rig.submit([5 + i], max_tokens=2, priority=priority, handle=i)
    rig.run()
    return rig.client.ended[1:]


def test_priority_decides_and_equals_go_by_arrival():
    assert order_of([5, 0, -3, 5, 0], "priority") == [2, 1, 4, 0, 3]


def test_without_the_policy_priorities_do_not_count():
    assert order_of([5, 0, -3, 5, 0], "fcfs") == [0, 1, 2, 3, 4]


def test_the_least_urgent_pays_for_a_shortage():
    rig = Rig(Options(num_blocks=14, block_size=4), scheduling_policy="priority")
    preempted: set[int] = set()
    for i, priority in enumerate((7, 0, 3)):
        rig.submit([5 + i] * 4, max_tokens=28, ignore_eos=True, priority=priority)
    state = rig.engine._driver.state
    plain = state.preempt

    def preempt(request, *, offload):
        preempted.add(request.handle)
        plain(request, offload=offload)

    state.preempt = preempt
    rig.run()
    assert preempted and 1 not in preempted
    for i in range(3):
        assert rig.client[i].tokens == rig.expected([5 + i] * 4, max_tokens=28, ignore_eos=True)[0]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 60)), min_size=2, max_size=20))
def test_no_victim_is_more_urgent_than_one_that_stays(rows):
    columns = Columns(32, 64, 16)
    slots = np.arange(len(rows), dtype=np.int32)
    for slot, (priority, tokens) in enumerate(rows):
        columns.priority[slot], columns.num_tokens[slot] = priority, tokens
        columns.num_computed_tokens[slot] = tokens
        columns.max_total[slot], columns.arrival[slot] = 64, slot
    victim = pick_victim(columns, slots, StepCostModel(), None, 16).slot
    assert columns.priority[victim] == max(priority for priority, _ in rows)


# -- fair shares ----------------------------------------------------------------------------
@given(
    prompts=st.lists(st.integers(2, 4_000), min_size=1, max_size=12),
    decoding=st.integers(0, 300),
    budget=st.integers(8, 2048),
)
@settings(max_examples=60, deadline=None)
def test_no_prompt_starves_and_decodes_go_on(prompts: list[int], decoding: int, budget: int):
    """hand_out() alone, step after step. The first rows are prompts until they are computed, the
    others decode for ever: none of them waits longer than its turn."""
    left = np.array(prompts + [1] * decoding, np.int32)
    is_prompt = np.arange(len(left)) < len(prompts)
    last, waited = np.zeros(len(left), np.int64), np.zeros(len(left), np.int64)
    share = budget // 4  # what running prompts keep
    turn = -(-(decoding + len(prompts)) // (budget - share))
    bound = sum(prompts) // share + len(prompts) * (turn + 1) + 2
    for seq in range(1, bound + 1):
        live = np.flatnonzero(left > 0)
        nums, _ = hand_out(left[live], last[live], [], budget)
        assert nums.sum() <= budget and (nums <= left[live]).all()
        long = left[live] > 1
        if long.any():
            assert nums[np.flatnonzero(long)[0]] > 0, "the first prompt stands still"
        served = live[nums > 0]
        waited += 1
        waited[served] = 0
        last[served] = seq
        if decoding:
            assert waited[~is_prompt].max() <= turn
        left[live] -= np.where(is_prompt[live], nums, 0)
        if not left[is_prompt].any():
            return
    raise AssertionError(f"{(left[is_prompt] > 0).sum()} prompts are left after {bound} steps")


def test_several_long_prompts_come_along_together_while_others_decode():
    rig = Rig(
        Options(num_blocks=600, max_model_len=1024, check_reads=False), max_num_batched_tokens=64
    )
    for i in range(6):
        rig.submit([5 + i], max_tokens=200, ignore_eos=True)
    for _ in range(8):
        rig.turn()
    for i in range(4):
        rig.submit([20 + i] * 600, max_tokens=2)
    before = [len(rig.client[i].tokens) for i in range(6)]
    computed = []
    for _ in range(12):
        rig.turn()
        state = rig.engine._driver.state
        computed.append(state.columns.num_computed_tokens[state.running_slots[6:]].tolist())
    after = [len(rig.client[i].tokens) for i in range(6)]
    assert min(b - a for a, b in zip(before, after, strict=True)) >= 12  # a token a step
    assert len(computed[-1]) == 4 and min(computed[-1]) > 150
    assert all(max(shares) - min(shares) <= 64 for shares in computed if len(shares) == 4)
    rig.run()


def test_a_prompt_of_32k_tokens_is_served_whole_while_others_decode():
    options = Options(
        num_blocks=3000, max_model_len=40_960, block_size=16, check_reads=False, max_slots=8
    )
    rig = Rig(options, max_num_batched_tokens=2048)
    for i in range(4):
        rig.submit([5 + i], max_tokens=60, ignore_eos=True)
    for _ in range(4):
        rig.turn()
    prompt = [(7 * i) % 900 for i in range(32_768)]
    long = rig.submit(prompt, max_tokens=4)
    while not rig.client[long].tokens:
        before = [len(rig.client[i].tokens) for i in range(4)]
        rig.turn()
        rig.turn()
        assert all(len(rig.client[i].tokens) > n for i, n in enumerate(before))  # none stands still
    rig.run()
    assert rig.client[long].tokens == rig.expected(prompt, max_tokens=4)[0]


@pytest.mark.parametrize(("seqs", "block_size"), [(256, 16), (512, 16), (512, 256)])
def test_so_many_run_at_once(seqs: int, block_size: int):
    options = Options(
        num_blocks=2 * seqs + 8, block_size=block_size, max_slots=seqs + 8, check_reads=False
    )
    rig = Rig(options, max_num_seqs=seqs, max_num_batched_tokens=4096)
    for i in range(seqs + 40):
        rig.submit([5 + i % 800, i // 800 + 1], max_tokens=6, ignore_eos=True)
    most = 0
    for _ in range(6):
        rig.turn()
        most = max(most, rig.engine.stats().num_running)
    assert most == seqs
    rig.run()


# -- the bounds -----------------------------------------------------------------------------
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 60)),
            st.tuples(st.just("turn"), st.integers(1, 4)),
        ),
        max_size=60,
    ),
    waiting=st.integers(0, 4),
    bound=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_whatever_comes_and_all_places_return(steps, waiting, bound):
    rig = Rig(max_num_seqs=2, max_waiting=waiting, max_requests=bound)
    room = min(2 + waiting, bound or 99)
    assert rig.engine.stats().max_requests == room
    for kind, value in steps:
        if kind == "submit":
            live = rig.engine._intake.num_live
            first = rig.num_submitted
            for left in range(value, -1, -1):
                rig.submit([5], max_tokens=3, num_more=left)
            rig.engine._take_inbox()
            taken = [i for i in range(first, rig.num_submitted) if rig.client[i].error is None]
            assert len(taken) == (value + 1 if live + value + 1 <= room else 0)
        elif kind == "cancel":
            rig.engine.cancel(rig.client, value)
            rig.engine._take_inbox()
        else:
            for _ in range(value):
                rig.turn()
        assert rig.engine._intake.num_live <= room
        rig.engine.check()
    for _ in range(200):
        rig.turn()
    assert rig.engine._intake.num_live == 0 == rig.engine.stats().num_waiting
