"""The whole scheduler with a host tier: evicted blocks come back, preempted requests too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_helpers import Rig
from test_engine_properties import SETTINGS, drive, requests

from fakes.worker import FakeWorker, Options
from quire.step_cost import Point, StepCostModel, StepSize
from quire.v1 import step_pb2
from quire_scheduler.columns import Columns
from quire_scheduler.kv import HostTier
from quire_scheduler.kv.explain import most_hit
from quire_scheduler.preemption import Victim, pick_victim, recompute_s

COSTS = ((1, 1, 2000), (512, 512, 30_000), (1, 512, 2100))  # a token costs about 55 us


def rig_with(num_blocks: int = 20, num_host_blocks: int = 200, copy_micros: int = 5, **config):
    options = Options(
        num_blocks=num_blocks, num_host_blocks=num_host_blocks, copy_micros=copy_micros,
        step_costs=COSTS, max_slots=config.get("max_num_seqs", 8) + 1,
    )  # fmt: skip
    return hold_costs(Rig(options, **{"max_num_batched_tokens": 256, "max_num_seqs": 8, **config}))


def hold_costs(rig: Rig) -> Rig:
    """The simulated steps all take the same: the table is to hold."""
    rig.engine._driver.pacer.cost.observe = lambda *_: None  # type: ignore[method-assign]
    return rig


def ask(rig: Rig, prompt: list[int], **params) -> int:
    """Run one request alone; its cached tokens."""
    handle = rig.submit(prompt, **params)
    rig.run()
    stream = rig.client[handle]
    assert (stream.tokens, stream.reason) == rig.expected(prompt, **params)
    return stream.num_cached_tokens


def prompt_of(number: int, length: int = 160) -> list[int]:
    return [(number * 97 + i * 5) % 900 + 3 for i in range(length)]


def test_what_was_evicted_comes_back_from_the_host():
    rig = rig_with()
    for number in range(4):
        assert ask(rig, prompt_of(number)) == 0
    assert ask(rig, prompt_of(0)) == 144  # all but the block of the last token
    stats = rig.engine.stats()
    assert stats.loaded_blocks == 9 == rig.worker.num_copied["load"]
    assert stats.host_hit_tokens == 144 and stats.prefix_hit_tokens == 144
    assert stats.offloaded_blocks == rig.worker.num_copied["offload"] > 0
    assert stats.host_blocks_used == len(rig.worker.host_names)
    kv = rig.engine._driver.state.kv
    best = kv.explain(most_hit(kv, 1, "host")[0], "host")
    assert (best.tier, best.state, best.hits > 0) == ("host", "cached", True)
    assert rig.worker.host_names[best.block_id] == best.name


def test_a_block_with_a_copy_on_the_host_is_not_copied_again():
    rig = rig_with()
    for _ in range(3):
        for number in range(3):
            ask(rig, prompt_of(number))
    full = 3 * (160 + 7) // 16  # blocks of three sequences; the last token has no KV
    assert rig.worker.num_copied["offload"] <= full
    assert rig.worker.num_copied["load"] > 2 * rig.worker.num_copied["offload"] // 3


def test_what_is_cheaper_to_compute_is_not_copied():
    rig = rig_with(copy_micros=5000)
    for number in (0, 1, 2, 0):
        assert ask(rig, prompt_of(number)) == 0
    assert rig.worker.num_copied == {"offload": 0, "load": 0}


def test_nothing_is_copied_while_nothing_is_known_of_costs():
    rig = Rig(Options(num_blocks=20, num_host_blocks=50, step_costs=(), max_slots=5))
    rig.engine._driver.pacer.cost.observe = lambda size, micros: None
    for number in range(3):
        ask(rig, prompt_of(number))
    assert rig.worker.num_copied["offload"] == 0


def test_copies_of_a_plan_keep_to_the_limit_while_others_decode():
    rig = rig_with(num_blocks=60, copy_micros=1000, max_num_batched_tokens=512)
    host = rig.engine._driver.state.kv.host
    host.recompute_s = lambda first, n: n * 1.0  # loading always pays
    host.observe = lambda blocks, seconds: None
    long = prompt_of(1, 500)
    ask(rig, long)
    for number in range(2, 8):
        ask(rig, prompt_of(number, 300))
    rig.worker.keep_plans = True
    talker = rig.submit([5, 6, 7], max_tokens=200, ignore_eos=True)
    while len(rig.client[talker].tokens) < 3:
        rig.turn()
    handle = rig.submit(long)
    rig.run()
    assert rig.client[handle].num_cached_tokens > 16 * 15
    assert rig.client[handle].tokens == rig.expected(long)[0]
    loads = [
        sum(len(op.src_block_ids) // 4 for op in plan.kv_ops if op.kind == step_pb2.KV_OP_KIND_LOAD)
        for plan in rig.worker.plans
    ]
    copies = [sum(len(op.src_block_ids) // 4 for op in p.kv_ops) for p in rig.worker.plans]
    assert max(loads) == 5 and sum(loads) > 15  # half of 10 ms at 1 ms a block, over several plans
    assert max(copies) <= 10


def test_a_load_alone_makes_a_plan():
    rig = rig_with(num_blocks=40)
    host = rig.engine._driver.state.kv.host
    host.recompute_s = lambda first, n: n * 1.0
    host.observe = lambda blocks, seconds: None
    for number in range(4):
        ask(rig, prompt_of(number, 400))
    rig.worker.keep_plans = True
    host.copy_s = 0.02  # six of them in a plan that holds up nobody
    assert ask(rig, prompt_of(0, 400)) == 384
    loads = [
        sum(len(op.dst_block_ids) // 4 for op in p.kv_ops if op.kind == step_pb2.KV_OP_KIND_LOAD)
        for p in rig.worker.plans
    ]
    assert loads[:4] == [6, 6, 6, 6]
    assert [len(plan.slots) // 4 for plan in rig.worker.plans[:4]] == [0, 0, 0, 1]


def test_a_scheduler_that_restarts_finds_both_tiers_full():
    rig = rig_with()
    for number in range(4):
        ask(rig, prompt_of(number))
    worker = rig.worker
    again = rig_with()
    again.worker = FakeWorker(again.link.worker(), worker.options)
    again.worker.inner = worker.inner
    worker.inner.outer = again.worker
    again.worker.hello()
    again.engine.turn(0)
    hold_costs(again)
    assert again.engine.stats().host_blocks_used == len(worker.host_names) > 0
    for number in range(4):
        assert ask(again, prompt_of(number)) > 0
    assert again.worker.num_copied["load"] > 0


def test_a_new_worker_process_has_an_empty_host_tier():
    rig = rig_with()
    for number in range(4):
        ask(rig, prompt_of(number))
    rig.worker.die()
    rig.worker = FakeWorker(rig.link.worker(), rig.options)
    rig.worker.hello()
    rig.engine.turn(0)
    assert rig.engine.stats().host_blocks_used == 0 < rig.engine.stats().offloaded_blocks
    assert ask(rig, prompt_of(0)) == 0


def test_a_result_that_leaves_out_a_copy_begins_a_new_epoch():
    rig = rig_with()
    execute = rig.worker.execute
    lied: list[int] = []

    def lie(plan):
        result = execute(plan)
        if plan.kv_ops and not lied:
            lied.append(plan.seq)
            del result.kv_ops_done[:]
        return result

    rig.worker.execute = lie
    for number in range(4):
        ask(rig, prompt_of(number))
    assert lied and rig.engine.stats().epoch == 2


def test_without_prefix_caching_the_tier_stays_empty(caplog):
    rig = rig_with(enable_prefix_caching=False)
    for number in (0, 1, 2, 0):
        assert ask(rig, prompt_of(number)) == 0
    assert "--host-cache-memory" in caplog.text and "--enable-prefix-caching" in caplog.text
    assert rig.engine.stats().host_blocks_total == 0


# -- preemption -----------------------------------------------------------------------------
def shortage(rig: Rig, count: int = 6, max_tokens: int = 120) -> list[list[int]]:
    prompts = [prompt_of(i, 40 + 7 * i) for i in range(count)]
    for prompt in prompts:
        rig.submit(prompt, max_tokens=max_tokens, ignore_eos=True)
    return prompts


def test_a_preempted_request_comes_back_from_the_host():
    rig = rig_with(num_blocks=30)
    prompts = shortage(rig)
    rig.run()
    for i, prompt in enumerate(prompts):
        expected = rig.expected(prompt, max_tokens=120, ignore_eos=True)
        assert (rig.client[i].tokens, rig.client[i].reason) == expected
    stats = rig.engine.stats()
    kinds = dict(stats.preemptions)
    assert kinds["offload"] > 0 == kinds["recompute"]
    assert stats.loaded_blocks > 0
    # at most the part of a block that no copy holds, and what fell to the limit of a plan
    assert stats.num_recomputed_tokens < 32 * kinds["offload"]


def test_without_a_host_tier_it_computes_its_tokens_again():
    rig = rig_with(num_blocks=30, num_host_blocks=0)
    prompts = shortage(rig)
    rig.run()
    stats = rig.engine.stats()
    kinds = dict(stats.preemptions)
    assert kinds["recompute"] > 0 == kinds["offload"]
    assert stats.num_recomputed_tokens > 0
    computed = sum(len(p) + 119 for p in prompts)
    assert stats.num_scheduled_tokens == computed + stats.num_recomputed_tokens


def cost_model(per_token_us: float) -> StepCostModel:
    points = [Point(StepSize(n, n, 0, 1), 1000 + per_token_us * n) for n in (1, 100, 1000)]
    return StepCostModel(points)


def columns_with(computed: list[int]) -> tuple[Columns, np.ndarray]:
    columns = Columns(len(computed), 4096, 16)
    columns.max_total[:] = 4000
    columns.num_tokens[:] = columns.num_computed_tokens[:] = computed
    columns.arrival[:] = range(len(computed))
    return columns, np.arange(len(computed), dtype=np.int32)


def host_of(copy_s: float, cost: StepCostModel, num_blocks: int = 1000) -> HostTier:
    return HostTier(num_blocks, 16, copy_s, lambda first, n: recompute_s(cost, first, n), lambda: 0)


def test_the_victim_loses_the_fewest_seconds():
    cost = cost_model(50)
    columns, slots = columns_with([160, 175, 400])
    assert pick_victim(columns, slots, cost, None, 16) == Victim(0, False)
    # 160 tokens: 9 whole blocks behind the last token, and 16 to compute; 175: 10, and 15
    assert pick_victim(columns, slots, cost, host_of(1e-6, cost), 16) == Victim(1, True)
    columns.priority[:] = (0, 0, 3)
    assert pick_victim(columns, slots, cost, host_of(1e-6, cost), 16) == Victim(2, True)


def test_offload_is_chosen_while_two_copies_cost_less_than_computing():
    cost = cost_model(50)
    per_block = recompute_s(cost, 0, 16)
    columns, slots = columns_with([801])
    assert pick_victim(columns, slots, cost, host_of(per_block * 0.45, cost), 16).offload
    assert not pick_victim(columns, slots, cost, host_of(per_block * 0.55, cost), 16).offload
    assert not pick_victim(columns, slots, cost, host_of(1e-6, cost, num_blocks=49), 16).offload
    unknown = StepCostModel()
    assert not pick_victim(columns, slots, unknown, host_of(1e-6, unknown), 16).offload


@pytest.mark.parametrize("num_host_blocks", [0, 12, 400])
@pytest.mark.parametrize("num_blocks", [12, 17, 24])
def test_under_shortage_nobody_is_preempted_over_and_over(num_blocks, num_host_blocks):
    """16 requests in room for 2 to 4: each is preempted a few times, and all end."""
    rig = rig_with(num_blocks=num_blocks, num_host_blocks=num_host_blocks, max_num_seqs=16)
    live = {}
    prompts = [prompt_of(i, 20 + (i * 37) % 70) for i in range(16)]
    for prompt in prompts:
        rig.submit(prompt, max_tokens=60, ignore_eos=True)
    for _ in range(4000):
        rig.turn()
        live.update({r.request_id: r for r in rig.engine._intake.live})
        if rig.client.finished == 16:
            break
    rig.run()
    for i, prompt in enumerate(prompts):
        assert rig.client[i].tokens == rig.expected(prompt, max_tokens=60, ignore_eos=True)[0]
    assert max(r.num_preemptions for r in live.values()) <= 4
    stats = rig.engine.stats()
    assert stats.num_preemptions <= 32
    if num_host_blocks == 400:
        assert stats.num_recomputed_tokens <= stats.num_scheduled_tokens // 5


# -- whatever happens ------------------------------------------------------------------------
@SETTINGS
@given(
    requests, st.integers(16, 300), st.integers(11, 40), st.integers(1, 60), st.integers(1, 8),
    st.sampled_from([1, 400, 3000]), st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from(["hello", "new", "fail", "gap"])), max_size=3
    ),
)  # fmt: skip
def test_streams_equal_the_oracle_with_a_host_tier(
    arrivals, budget, num_blocks, num_host_blocks, max_num_seqs, copy_micros, events
):
    rig = rig_with(
        num_blocks, num_host_blocks, copy_micros, max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
    )  # fmt: skip
    at = dict(events)
    failing: list[bool] = []

    def fail(plan, worker) -> str:
        if failing and len(worker.slots) + len(plan.admit) > 1:
            failing.clear()
            return "boom"
        return ""

    rig.options.fail = fail

    def trouble(turn: int) -> None:
        kind = at.get(turn)
        if kind == "hello":
            rig.worker.hello()
        elif kind == "new":
            rig.worker.die()
            rig.worker = FakeWorker(rig.link.worker(), rig.options)
            rig.worker.hello()
        elif kind == "fail":
            failing.append(True)
        elif kind == "gap":
            rig.worker.broken = "gap: somebody lost a plan"

    drive(rig, arrivals, trouble, guilty_ok=True)
