"""Who computes how many tokens: budget, fairness, chunks, victims, slots."""

from __future__ import annotations

import numpy as np
import pytest
from sched_helpers import Rig

from fakes.worker import Options
from quire.step_cost import StepCostModel
from quire.v1 import step_pb2
from quire_scheduler.columns import Columns
from quire_scheduler.preemption import pick_victim
from quire_scheduler.shares import hand_out, water_fill


def rows(plan: step_pb2.StepPlan) -> dict[int, int]:
    slots, nums = np.frombuffer(plan.slots, "<i4"), np.frombuffer(plan.num_tokens, "<i4")
    return dict(zip(slots.tolist(), nums.tolist(), strict=True))


def step(rig: Rig) -> step_pb2.StepPlan:
    """The engine sends what is due, the worker runs one plan of it."""
    rig.worker.keep_plans = True
    before = len(rig.worker.plans)
    rig.engine.turn(0)
    while len(rig.worker.plans) == before:
        assert rig.worker.pump(1), "no plan came"
    return rig.worker.plans[-1]


@pytest.mark.parametrize(
    ("wants", "budget", "shares"),
    [
        ([100], 40, [40]),
        ([100, 100], 40, [20, 20]),
        ([10, 100], 40, [10, 30]),
        ([100, 10], 40, [30, 10]),
        ([100, 100, 100], 41, [14, 14, 13]),
        ([5, 5], 40, [5, 5]),
        ([], 40, []),
        ([3, 4], 0, [0, 0]),
    ],
)
def test_shares_are_fair(wants, budget, shares):
    got = water_fill(wants, budget)
    assert sorted(got) == sorted(shares)
    assert sum(got) == min(sum(wants), budget)


def wanted(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_decoding_rows_come_before_prompts():
    nums, shares = hand_out(wanted(1, 500, 1), np.zeros(3, np.int64), [], 32)
    assert nums.tolist() == [1, 30, 1] and shares == []


def test_a_short_prompt_is_not_stuck_behind_a_long_one():
    nums, shares = hand_out(wanted(5000), np.zeros(1, np.int64), [20], 512)
    assert nums.tolist() == [492] and shares == [20]


def test_when_the_budget_is_too_small_the_longest_unserved_go_first():
    last = np.array([9, 3, 7, 1], np.int64)
    nums, _ = hand_out(wanted(1, 1, 1, 1), last, [], 2)
    assert nums.tolist() == [0, 1, 0, 1]


def test_running_prompts_keep_a_quarter_of_the_budget():
    nums, _ = hand_out(wanted(*[1] * 40, 500), np.zeros(41, np.int64), [], 16)
    assert nums[:40].sum() == 12 and nums[40] == 4


def test_the_victim_loses_least():
    columns = Columns(4, 64, 16)
    columns.max_total[:] = 60
    columns.num_tokens[:] = (30, 20, 40, 20)
    columns.num_computed_tokens[:] = (30, 20, 40, 20)
    columns.arrival[:] = (0, 1, 2, 3)
    slots = np.arange(4, dtype=np.int32)

    def victim() -> int:
        return pick_victim(columns, slots, StepCostModel(), None, 16).slot

    assert victim() == 3  # fewest tokens, the later of two
    columns.priority[:] = (5, 1, 1, 1)
    assert victim() == 0  # the lowest priority
    columns.priority[:] = 0
    columns.num_tokens[2], columns.num_expected[2] = 59, 60
    assert victim() == 2  # tokens in flight complete it: it loses nothing


def test_a_long_prompt_is_spread_over_steps():
    rig = Rig(max_num_batched_tokens=32)
    rig.submit(list(range(3, 103)), max_tokens=2)
    sizes = [sum(rows(step(rig)).values()) for _ in range(4)]
    assert sizes == [32, 32, 32, 4]
    rig.run()


def test_without_chunks_a_prompt_runs_whole():
    rig = Rig(max_num_batched_tokens=32, enable_chunked_prefill=False)
    rig.submit(list(range(3, 23)), max_tokens=2)
    rig.submit(list(range(103, 123)), max_tokens=2)
    rig.submit(list(range(203, 303)), max_tokens=2)
    rig.worker.keep_plans = True
    rig.run()
    prompts = [[n for n in rows(p).values() if n > 1] for p in rig.worker.plans]
    assert [p for p in prompts if p] == [[20], [20], [100]]


def test_a_request_near_its_end_is_not_scheduled_extra():
    rig = Rig()
    rig.worker.keep_plans = True
    rig.submit([5, 6, 7], max_tokens=4)
    rig.run()
    assert sum(len(rows(p)) for p in rig.worker.plans) == 4


def test_decode_rows_carry_neither_position_nor_token():
    rig = Rig()
    rig.submit([5, 6, 7], max_tokens=9)
    step(rig)
    plan = step(rig)
    assert not plan.admit and rows(plan) == {0: 1}
    assert plan.flags == bytes([step_pb2.ROW_FLAG_SAMPLE])
    rig.run()


def test_requests_share_a_prefix_within_one_step():
    rig = Rig(max_num_batched_tokens=512)
    prompt = list(range(3, 67))
    rig.submit(prompt)
    rig.submit([*prompt, 5])
    plan = step(rig)
    assert [a.num_computed_tokens for a in plan.admit] == [0, 64]
    rig.run()
    assert rig.client[1].num_cached_tokens == 64


def test_slots_are_reused_only_after_the_plan_that_retired_them():
    rig = Rig(Options(max_slots=2), max_num_seqs=2)
    rig.worker.keep_plans = True
    for i in range(6):
        rig.submit([5 + i, 6, 7], max_tokens=3)
    rig.run()
    retired_in: dict[int, int] = {}
    for plan in rig.worker.plans:
        for admit in plan.admit:
            assert retired_in.pop(admit.slot, 0) < plan.seq
        for slot in np.frombuffer(plan.retired_slots, "<i4").tolist():
            retired_in[slot] = plan.seq


def test_too_few_blocks_preempt_and_lose_nothing():
    rig = Rig(Options(num_blocks=9, max_slots=4), max_num_seqs=4)
    prompts = [[7 + i] * 20 for i in range(4)]
    for prompt in prompts:
        rig.submit(prompt, max_tokens=60)
    rig.run()
    assert rig.engine.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert (rig.client[i].tokens, rig.client[i].reason) == rig.expected(prompt, max_tokens=60)


def test_two_requests_do_not_preempt_each_other_in_turn():
    rig = Rig(Options(num_blocks=14, max_slots=4), max_num_seqs=2)
    for i in range(2):
        rig.submit([7 + i] * 90, max_tokens=100)
    rig.run()
    assert rig.engine.stats().num_preemptions <= 2


def test_a_preempted_request_keeps_its_place_in_front():
    rig = Rig(Options(num_blocks=9, max_slots=4), max_num_seqs=2)
    rig.submit([7] * 40, max_tokens=60)
    rig.submit([8] * 40, max_tokens=60)
    rig.submit([9] * 10, max_tokens=2)
    first = rig.client[2]
    while not first.tokens:
        rig.turn()
    preempted = [r for r in rig.engine._intake.live if r.num_preemptions]
    assert rig.engine.stats().num_preemptions > 0
    assert all(r.slot >= 0 for r in preempted), "a newcomer overtook a preempted request"
    rig.run()


def test_lower_priority_numbers_start_first():
    rig = Rig(max_num_seqs=1, scheduling_policy="priority")
    for i, priority in enumerate((5, 1, 3)):
        rig.submit([9 + i], max_tokens=2, priority=priority)
    done: list[int] = []
    while len(done) < 3:
        rig.turn()
        done += [h for h, s in rig.client.streams.items() if s.reason and h not in done]
    assert done == [1, 2, 0]


def test_a_context_larger_than_the_pool_is_cut_to_it():
    rig = Rig(Options(num_blocks=5, max_model_len=512))
    assert rig.engine.model().max_model_len == 64
    rig.submit([5] * 10, max_tokens=500)
    rig.run()
    assert rig.client[0].reason == "length" and len(rig.client[0].tokens) == 54


def test_tokens_in_flight_of_a_preempted_request_are_kept_before_it_runs_again():
    rig = Rig()
    rig.submit([5, 6, 7], max_tokens=12)
    rig.turn()
    rig.engine.turn(0)
    state = rig.engine._driver.state
    request = state.last_started
    assert len(state.in_flight) == 2 and state.in_flight_still(request)
    known = request.num_tokens
    state.preempt(request, offload=False)
    assert request.slot >= 0 and request in state.waiting
    assert rig.engine._driver.send_plan() is False, "admitted again with tokens in flight"
    rig.worker.pump()
    rig.engine.turn(0)
    assert request.num_tokens == known + 2
    assert request in [r for plan in state.in_flight for r, _ in plan.admitted]
    rig.run()
    assert rig.client[0].tokens == rig.expected([5, 6, 7], max_tokens=12)[0]


def test_the_automatic_budget_follows_what_steps_cost():
    costs = [(16, 16, 4_000), (64, 64, 16_000), (512, 512, 128_000)]
    rig = Rig(Options(step_costs=costs, max_model_len=4096, num_blocks=512))
    rig.submit(list(range(3, 803)) * 4, max_tokens=1)
    first = sum(rows(step(rig)).values())
    assert first == 992  # 250 us a token, a quarter of a second
    rig.run()


def test_traces_stand_beside_the_admissions():
    rig = Rig()
    rig.submit([5], trace=("00-" + "a" * 32 + "-" + "b" * 16 + "-01", ""))
    rig.submit([6])
    plan = step(rig)
    assert [bool(t.traceparent) for t in plan.traces] == [True, False]
    assert plan.admit[0].trace == plan.traces[0]
    rig.run()
