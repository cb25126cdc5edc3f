"""The runner against a plain reference loop: chunks, batches, blocks, epochs, failures."""

from __future__ import annotations

import numpy as np
import pytest
from runtime_fakes import (
    EOS,
    VOCAB,
    HashModel,
    Planner,
    context_logits,
    i32,
    make_runner,
    reference_greedy,
)

from quire.sampling import SamplingParams
from quire.v1 import common_pb2
from quire.v1 import step_pb2 as pb

PROMPT = [5, 17, 3, 3, 60, 41, 8, 22, 9, 1, 33]


def test_greedy_tokens_equal_the_plain_loop():
    assert Planner(make_runner()).generate(0, PROMPT, n=20) == reference_greedy(PROMPT, 20)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_a_prompt_in_chunks_gives_the_tokens_of_a_whole_one(chunk):
    assert Planner(make_runner()).generate(2, PROMPT, n=9, chunk=chunk) == reference_greedy(
        PROMPT, 9
    )


def test_rows_of_a_mixed_batch_do_not_disturb_each_other():
    planner = Planner(make_runner())
    prompts = {slot: PROMPT[slot:] + [slot] for slot in range(6)}
    planner.run({0: 12}, admit=[planner.admit(0, prompts[0])])
    planner.run({0: 1, 1: 4}, admit=[planner.admit(1, prompts[1])])
    planner.run({1: 7, 0: 1}, admit=[planner.admit(s, prompts[s]) for s in (2, 3)])
    planner.run({3: 9, 2: 10, 1: 1, 0: 1}, admit=[planner.admit(s, prompts[s]) for s in (4, 5)])
    planner.run({4: 8, 5: 7, 0: 1, 3: 1, 2: 1, 1: 1})
    for _ in range(3):
        planner.run({s: 1 for s in range(6) if s not in planner.finished})
    for slot, prompt in prompts.items():
        n = len(planner.outputs[slot])
        assert n >= 4 or slot in planner.finished
        assert planner.outputs[slot] == reference_greedy(prompt, n)


def test_blocks_of_another_request_serve_as_a_prefix():
    planner = Planner(make_runner())
    planner.generate(0, PROMPT, n=2)
    shared = planner.blocks[0][:2]
    out = planner.generate(1, PROMPT[:8] + [50], n=5, computed=8, blocks=shared)
    assert out == reference_greedy(PROMPT[:8] + [50], 5)


def test_an_interrupted_request_goes_on_from_prompt_and_delivered_tokens():
    whole = Planner(make_runner()).generate(0, PROMPT, n=12)
    planner = Planner(make_runner())
    first = list(planner.generate(0, PROMPT, n=5))
    planner.run(retire=[0])
    rest = planner.generate(3, PROMPT, n=7, output=first, chunk=6)
    assert first + rest == whole


def test_plans_that_follow_before_results_skip_a_row_that_has_ended():
    prompt = next(
        [a, b] for a in range(90) for b in range(90) if reference_greedy([a, b], 3) == [
            int(context_logits([a, b]).argmax()), EOS]
    )  # fmt: skip
    planner = Planner(make_runner())
    planner.run({0: 2}, admit=[planner.admit(0, prompt)])
    planner.run({0: 1, 1: 11}, admit=[planner.admit(1, PROMPT)])
    assert 0 in planner.finished
    result = planner.run({0: 1, 1: 1})
    assert result.slots == i32(0, 1) and result.num_outputs == b"\0\1"
    planner.run({0: 1})  # nothing at all to run
    assert len(planner.outputs[0]) == 2
    assert planner.outputs[1] == reference_greedy(PROMPT, 2)


def test_a_slot_can_change_hands_within_one_plan():
    planner = Planner(make_runner(max_slots=1))
    planner.generate(0, PROMPT, n=3)
    admit = [planner.admit(0, [1, 2, 3])]
    planner.run({0: 3}, admit=admit, retire=[0])
    assert planner.outputs[0] == reference_greedy([1, 2, 3], 1)


def test_two_new_blocks_for_a_slot_keep_their_order():
    planner = Planner(make_runner())
    planner.free = [9, 2, 31, 4, 7, 1, 0]
    planner.run({0: 6}, admit=[planner.admit(0, PROMPT), planner.admit(1, PROMPT[::-1])])
    planner.run({1: 11, 0: 5})
    planner.run({1: 1, 0: 1})
    assert planner.outputs[0] == reference_greedy(PROMPT, 2)
    assert planner.outputs[1] == reference_greedy(PROMPT[::-1], 2)


# -- sequence numbers and epochs --------------------------------------------------------------
def test_a_plan_that_arrives_twice_is_answered_from_memory():
    runner = make_runner()
    planner = Planner(runner)
    planner.run({0: 11}, admit=[planner.admit(0, PROMPT)])
    plan = planner.plan({0: 1})
    first = runner.execute(plan)
    steps = len(runner.model.steps)
    assert runner.execute(plan) == first
    assert len(runner.model.steps) == steps


def test_only_the_last_eight_results_are_kept():
    runner = make_runner()
    planner = Planner(runner)
    plans = [planner.plan() for _ in range(9)]
    results = [runner.execute(p) for p in plans]
    assert runner.execute(plans[1]) == results[1]
    old = runner.execute(plans[0])
    assert old.status == pb.STEP_STATUS_REFUSED and "gone" in old.error


def test_a_gap_ends_the_epoch():
    runner = make_runner()
    planner = Planner(runner)
    planner.run()
    missing, late = planner.plan(), planner.plan()
    assert runner.execute(late).status == pb.STEP_STATUS_REFUSED
    refused = runner.execute(missing)
    assert refused.status == pb.STEP_STATUS_REFUSED and "missing" in refused.error


def test_a_lower_epoch_is_refused_and_a_higher_one_starts_with_plan_1():
    runner = make_runner()
    Planner(runner, epoch=5).run()
    assert runner.execute(pb.StepPlan(epoch=4, seq=2)).status == pb.STEP_STATUS_REFUSED
    assert runner.execute(pb.StepPlan(epoch=6, seq=2)).status == pb.STEP_STATUS_REFUSED
    assert runner.execute(pb.StepPlan(epoch=0, seq=1)).status == pb.STEP_STATUS_REFUSED
    assert runner.execute(pb.StepPlan(epoch=6, seq=1)).status == pb.STEP_STATUS_OK
    assert runner.gate.highest_epoch == 6


def test_a_failed_step_commits_nothing_and_ends_the_epoch():
    model = HashModel()
    runner = make_runner(model=model)
    planner = Planner(runner)
    planner.run({0: 11}, admit=[planner.admit(0, PROMPT)])
    planner.run({0: 1})
    before = runner.table.num_tokens[0], runner.table.num_computed_tokens[0]
    model.breaks[77] = "raise"
    named = {"named_block_ids": i32(40), "block_names": b"n" * 16}
    failed = runner.execute(planner.plan({0: 1, 1: 2}, admit=[planner.admit(1, [4, 77])], **named))
    assert failed.status == pb.STEP_STATUS_FAILED and "on fire" in failed.error
    assert (runner.table.num_tokens[0], runner.table.num_computed_tokens[0]) == before
    assert not runner.transfer.names.is_named[40]
    assert runner.execute(planner.plan()).status == pb.STEP_STATUS_REFUSED
    model.breaks.clear()
    again = Planner(runner, epoch=2)
    out = again.generate(0, PROMPT, n=4, output=planner.outputs[0])
    assert planner.outputs[0] + out == reference_greedy(PROMPT, 6)


def test_a_new_epoch_drops_slots_and_keeps_names():
    runner = make_runner()
    planner = Planner(runner)
    planner.run(
        {0: 11}, admit=[planner.admit(0, PROMPT)],
        named_block_ids=i32(0, 1), block_names=b"a" * 16 + b"b" * 16,
    )  # fmt: skip
    again = Planner(runner, epoch=2)
    again.free = [7, 8, 9]
    again.run()
    assert not runner.table.in_use.any()
    assert runner.transfer.names.held() == (i32(0, 1), b"a" * 16 + b"b" * 16)
    out = again.generate(4, PROMPT, n=3, computed=8, blocks=[0, 1])
    assert out == reference_greedy(PROMPT, 3)
    assert runner.transfer.names.held()[0] == i32(0, 1)


def test_a_block_with_a_new_owner_loses_its_name():
    runner = make_runner()
    planner = Planner(runner)
    names = {"named_block_ids": i32(0, 1, 2), "block_names": bytes(48)}
    planner.run({0: 11}, admit=[planner.admit(0, PROMPT)], **names)
    planner.run(retire=[0])
    planner.free = [1]
    planner.generate(1, [3], n=1)
    assert runner.transfer.names.held()[0] == i32(0, 2)
    planner.run({2: 4}, admit=[planner.admit(2, [1, 2, 3, 4], blocks=[2])])
    assert runner.transfer.names.held()[0] == i32(0)
    op = pb.KvOp(op_id=9, kind=pb.KV_OP_KIND_ZERO, dst_block_ids=i32(0))
    assert list(planner.run(kv_ops=[op]).kv_ops_done) == [9]
    assert runner.transfer.names.held()[0] == b""
    assert not runner.kv_cache.pool[0].any()


# -- one row fails alone ----------------------------------------------------------------------
def test_nan_logits_fail_their_row_alone():
    model = HashModel()
    runner = make_runner(model=model)
    planner = Planner(runner)
    model.breaks[66] = "nan"
    admits = [planner.admit(0, PROMPT), planner.admit(1, [4, 66]), planner.admit(2, [8])]
    names = {"named_block_ids": i32(0, 3), "block_names": bytes(32)}
    result = planner.run({0: 11, 1: 2, 2: 1}, admit=admits, **names)
    assert planner.errors == {1: "numeric_error"} and result.num_outputs == b"\1\0\1"
    assert runner.transfer.names.held()[0] == i32(0)  # block 3 was the broken row's
    planner.run({0: 1, 2: 1})
    assert planner.outputs[0] == reference_greedy(PROMPT, 2)
    assert planner.outputs[2] == reference_greedy([8], 2)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"adapter": "pirate"}, "unsupported"),
        ({"grammar": common_pb2.Grammar(kind=1, text="{}")}, "unsupported"),
        ({"params": SamplingParams(temperature=-1)}, "invalid_request"),
        ({"params": SamplingParams(temperature=float("nan"))}, "invalid_request"),
        ({"params": SamplingParams(stop_token_ids=(VOCAB,))}, "invalid_request"),
    ],
)
def test_a_request_this_worker_cannot_do_fails_alone_but_fills_its_blocks(fields, name):
    planner = Planner(make_runner())
    admits = [planner.admit(0, PROMPT, **fields), planner.admit(1, [8])]
    planner.run({0: 8, 1: 1}, admit=admits)
    planner.run({0: 3, 1: 1})
    planner.run({0: 1, 1: 1})
    assert planner.errors == {0: name} and planner.outputs[0] == []
    assert planner.outputs[1] == reference_greedy([8], 3)
    out = planner.generate(2, PROMPT, n=2, computed=8, blocks=planner.blocks[0][:2])
    assert out == reference_greedy(PROMPT, 2)


# -- plans that can't be right ----------------------------------------------------------------
def bad_plans():
    admit = {"prompt_token_ids": i32(1, 2), "block_ids": i32(0)}
    return {
        "slots: 16 is not": {"slots": i32(16), "num_tokens": i32(1), "flags": b"\1"},
        "slots: -1 is not": {"slots": i32(-1), "num_tokens": i32(1), "flags": b"\1"},
        "nobody is in slot 3": {"slots": i32(3), "num_tokens": i32(1), "flags": b"\1"},
        "no column of int32": {"slots": b"\0\0\0"},
        "num_tokens has 2 entries": {"slots": i32(0), "num_tokens": i32(1, 1), "flags": b"\1"},
        "flags has 0 entries": {"slots": i32(0), "num_tokens": i32(1)},
        "a row has 0 tokens": {"slots": i32(0), "num_tokens": i32(0), "flags": b"\1"},
        "two rows": {"slots": i32(0, 0), "num_tokens": i32(1, 1), "flags": b"\1\1"},
        "flags: this worker": {"slots": i32(0), "num_tokens": i32(1), "flags": b"\4"},
        "would reach token 13, but has 12": {
            "slots": i32(0), "num_tokens": i32(2), "flags": b"\1",
        },
        "would sample after token": {
            "slots": i32(1), "num_tokens": i32(1), "flags": b"\1",
            "new_block_rows": i32(1), "new_block_ids": i32(9),
        },
        "blocks hold 4": {"slots": i32(1), "num_tokens": i32(6), "flags": b"\0"},
        "new_block_ids: 64": {"new_block_rows": i32(0), "new_block_ids": i32(64)},
        "new_block_rows: nobody": {"new_block_rows": i32(9), "new_block_ids": i32(1)},
        "more than 16 blocks": {"new_block_rows": i32(*[0] * 14), "new_block_ids": i32(*range(14))},
        "named_block_ids: -2": {"named_block_ids": i32(-2), "block_names": bytes(16)},
        "16-byte names": {"named_block_ids": i32(2), "block_names": bytes(15)},
        "block_names has 2": {"named_block_ids": i32(2), "block_names": bytes(32)},
        "retired_slots: 99": {"retired_slots": i32(99)},
        "reserved": {"draft_counts": i32(1)},
        "adapter_ops": {"adapter_ops": [pb.AdapterOp(name="x")]},
        "can't do KV_OP_KIND_SEND": {"kv_ops": [pb.KvOp(kind=pb.KV_OP_KIND_SEND)]},
        "fence": {"kv_ops": [pb.KvOp(kind=pb.KV_OP_KIND_ZERO, fence_seq=99)]},
        "kv_ops.dst_block_ids": {
            "kv_ops": [pb.KvOp(kind=pb.KV_OP_KIND_ZERO, dst_block_ids=i32(64))]
        },
        "slot 16 is not": {"admit": [pb.Admit(slot=16, **admit)]},
        "slot 0 is in use": {"admit": [pb.Admit(slot=0, **admit)]},
        "prompt_token_ids: 97": {"admit": [pb.Admit(slot=5, prompt_token_ids=i32(97))]},
        "output_token_ids: -1": {
            "admit": [pb.Admit(slot=5, prompt_token_ids=i32(1), output_token_ids=i32(-1))]
        },
        "has 0 prompt": {"admit": [pb.Admit(slot=5)]},
        "has 65 prompt": {"admit": [pb.Admit(slot=5, prompt_token_ids=i32(*[1] * 65))]},
        "must be below its 2": {"admit": [pb.Admit(slot=5, num_computed_tokens=2, **admit)]},
        "computed in 0 blocks": {
            "admit": [pb.Admit(slot=5, prompt_token_ids=i32(1, 2), num_computed_tokens=1)]
        },
        "17 blocks": {
            "admit": [pb.Admit(slot=5, prompt_token_ids=i32(1), block_ids=i32(*range(17)))]
        },
    }  # fmt: skip


@pytest.mark.parametrize("message", bad_plans())
def test_a_malformed_plan_fails_with_the_column_and_the_value(message):
    runner = make_runner()
    planner = Planner(runner)
    admits = [planner.admit(0, PROMPT), planner.admit(1, PROMPT)]
    planner.run({0: 11, 1: 4}, admit=admits)
    result = runner.execute(pb.StepPlan(epoch=1, seq=2, **bad_plans()[message]))
    assert result.status == pb.STEP_STATUS_FAILED
    assert message in result.error
    assert Planner(runner, epoch=2).generate(0, PROMPT, n=3) == reference_greedy(PROMPT, 3)


def test_the_last_token_of_a_full_context_is_sampled():
    planner = Planner(make_runner(max_model_len=12))
    assert len(planner.generate(0, PROMPT, n=2)) == 2
    result = planner.runner.execute(planner.plan({0: 1}))
    assert result.status == pb.STEP_STATUS_FAILED


def test_timings_add_up_to_the_step():
    import time

    runner = make_runner()
    planner = Planner(runner)
    plan = planner.plan({0: 11}, admit=[planner.admit(0, PROMPT)])
    begin = time.monotonic_ns()
    timings = runner.execute(plan, begin - 5_000_000).timings
    took = (time.monotonic_ns() - begin) // 1000
    assert 5000 <= timings.queue_micros < 5000 + took + 1000
    parts = timings.prepare_micros + timings.forward_micros + timings.sample_micros
    assert 0 < parts <= took
    assert np.frombuffer(runner.execute(planner.plan({0: 1})).token_ids, "<i4").size == 1
