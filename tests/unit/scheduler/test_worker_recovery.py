"""Workers fail, vanish, return and lie; requests go on, the guilty one alone does not."""

from __future__ import annotations

import numpy as np
import pytest
from sched_helpers import Rig

from fakes.worker import FakeWorker, Options
from quire.link import QueueLink
from quire.v1 import step_pb2


def fill(rig: Rig, count: int, **params) -> list[list[int]]:
    params.setdefault("max_tokens", 20)
    prompts = [[5 + i, 9, 11] for i in range(count)]
    for prompt in prompts:
        rig.submit(prompt, **params)
    return prompts


def verify(rig: Rig, prompts: list[list[int]], skip: set[int] = frozenset(), **params) -> None:
    params.setdefault("max_tokens", 20)
    for i, prompt in enumerate(prompts):
        if i not in skip:
            assert (rig.client[i].tokens, rig.client[i].reason) == rig.expected(prompt, **params)


def fail_once(rig: Rig, at_step: int) -> None:
    failed: list[int] = []

    def fail(plan, worker) -> str:
        if worker.num_steps == at_step and not failed:
            failed.append(plan.seq)
            return "boom"
        return ""

    rig.options.fail = fail


def test_a_failed_step_begins_a_new_epoch_and_loses_nothing():
    rig = Rig()
    fail_once(rig, 6)
    prompts = fill(rig, 4)
    rig.run()
    verify(rig, prompts)
    stats = rig.engine.stats()
    assert stats.epoch == 2 and rig.engine.counters.failed_steps == 1
    assert all(rig.client[i].deaths == 1 for i in range(4))


def test_only_those_in_the_failing_step_are_suspects():
    rig = Rig(max_num_seqs=2)
    fail_once(rig, 4)
    prompts = fill(rig, 4)
    rig.run()
    verify(rig, prompts)
    assert [rig.client[i].deaths for i in range(4)] == [1, 1, 0, 0]


def test_the_poisonous_request_is_found_and_fails_alone():
    rig = Rig()
    rig.options.fail = lambda plan, worker: (
        "poison"
        if any(a.request_id == "r3" for a in plan.admit)
        or any(worker.slots[s].request_id == "r3" for s in np.frombuffer(plan.slots, "<i4")
               if s in worker.slots)
        else ""
    )  # fmt: skip
    prompts = fill(rig, 8)
    rig.run()
    verify(rig, prompts, skip={3})
    guilty = rig.client[3]
    assert guilty.reason == "error" and guilty.error.name == "request_crashed_worker"
    assert guilty.deaths >= 2
    assert rig.engine.counters.failed_steps <= 5  # halves: log2(8) + 1, and one alone


def test_suspects_run_apart_from_newcomers():
    rig = Rig()
    fail_once(rig, 5)
    rig.worker.keep_plans = True
    prompts = fill(rig, 4)
    while not rig.engine.counters.failed_steps:
        rig.turn()
    prompts.append([200, 201])
    rig.submit(prompts[-1], max_tokens=20)
    rig.run()
    verify(rig, prompts)
    groups = [{a.request_id for a in p.admit} for p in rig.worker.plans if p.admit and p.epoch == 2]
    assert groups[0] == {"r0", "r1"} and groups[1] == {"r2", "r3"}
    assert any("r4" in g for g in groups[2:])


def test_a_single_request_is_tried_again_once():
    rig = Rig()
    rig.options.fail = lambda plan, worker: "always" if len(plan.slots) else ""
    rig.submit([5, 6])
    rig.run()
    assert rig.client[0].error.name == "request_crashed_worker"
    assert rig.engine.counters.failed_steps == 2


def replace_worker(rig: Rig) -> None:
    rig.worker.die()
    rig.engine.turn(0)
    rig.worker = FakeWorker(rig.link.worker(), rig.options)
    rig.worker.hello()


def test_a_request_that_gets_further_outlives_any_number_of_workers():
    """Deaths count only while it makes no progress: it was there, it did not do it."""
    rig = Rig()
    prompts = fill(rig, 1, max_tokens=200)
    for death in range(1, 6):
        target = 30 * death
        while len(rig.client[0].tokens) < target:
            rig.turn()
        replace_worker(rig)
    rig.run()
    verify(rig, prompts, max_tokens=200)
    assert rig.client[0].deaths == 1


def test_a_request_that_dies_twice_at_the_same_place_fails():
    rig = Rig()
    rig.options.fail = lambda plan, worker: (
        "at 25" if worker.inner.steps.columns.num_tokens.max() >= 25 else ""
    )
    rig.submit([5, 6], max_tokens=60)
    rig.run()
    assert rig.client[0].error.name == "request_crashed_worker"
    assert rig.engine.counters.failed_steps == 2 and len(rig.client[0].tokens) > 16


def test_whoever_computes_in_any_plan_in_flight_is_a_suspect():
    """The worker may have died of the second plan before the answer to the first was out."""
    costs = [(1, 1, 50_000), (512, 512, 50_000), (1, 4096, 50_000)]
    rig = Rig(Options(step_costs=costs))
    rig.submit([5, 6], max_tokens=20)
    rig.engine.turn(0)
    rig.submit([7, 8], max_tokens=20)
    rig.now += 0.049  # the first step is nearly over: the second plan leaves
    rig.engine.turn(0)
    state = rig.engine._driver.state
    assert [len(plan.slots) for plan in state.in_flight] == [1, 2]
    replace_worker(rig)
    rig.engine.turn(0)
    assert [request.deaths for request in rig.engine._intake.live] == [1, 1]
    while state.probation.suspects:
        assert len(state.in_flight) <= 1  # else it would not be known who was computing
        rig.turn()
    rig.run()
    assert [rig.client[i].reason for i in range(2)] == ["length", "length"]


def test_a_worker_that_was_given_up_is_asked_who_it_is():
    rig = Rig()
    prompts = fill(rig, 2)
    rig.turn()
    rig.worker.heartbeat()
    rig.engine.turn(0)
    for _ in range(4):
        rig.now += 0.9
        rig.engine.turn(0)
    assert not rig.engine.stats().ready  # it stood still, and is given up
    while rig.worker.link.recv(0) is not None:
        pass
    rig.worker.heartbeat()  # it wakes
    rig.engine.turn(0)
    answer = step_pb2.SchedulerFrame.FromString(rig.worker.link.recv(0))
    assert answer.WhichOneof("message") == "heartbeat" and answer.heartbeat.epoch == 0
    rig.worker.hello()
    rig.run()
    verify(rig, prompts)


def test_a_replaced_worker_process_is_a_death():
    rig = Rig()
    prompts = fill(rig, 3)
    for _ in range(5):
        rig.turn()
    rig.worker.die()
    rig.engine.turn(0)
    rig.worker = FakeWorker(rig.link.worker(), rig.options)
    rig.worker.highest_epoch = 41  # it has served another scheduler
    rig.worker.hello()
    rig.run()
    verify(rig, prompts)
    assert rig.engine.stats().epoch == 42
    assert all(rig.client[i].deaths == 1 for i in range(3))


def test_a_silent_worker_is_lost_named_and_taken_back():
    rig = Rig()
    prompts = fill(rig, 2)
    rig.turn()
    rig.worker.heartbeat()
    rig.engine.turn(0)
    assert rig.engine.stats().healthy
    for _ in range(3):
        rig.now += 0.9
        rig.engine.turn(0)
    stats = rig.engine.stats()
    assert not stats.healthy and "rank 0" in stats.problem and stats.ready
    rig.now += 0.9
    rig.engine.turn(0)
    stats = rig.engine.stats()
    assert not stats.ready and "rank 0 was silent" in stats.problem
    assert stats.num_waiting == 2
    rig.worker.hello()  # frozen, not dead
    rig.run()
    verify(rig, prompts)


def test_a_worker_that_never_sent_a_heartbeat_is_not_judged_by_it():
    rig = Rig()
    fill(rig, 1)
    rig.engine.turn(0)
    for _ in range(10):
        rig.now += 0.9
        rig.engine.turn(0)
    assert rig.engine.stats().healthy
    rig.run()


def test_a_standstill_of_the_engine_itself_blames_nobody():
    rig = Rig()
    fill(rig, 1, max_tokens=200)
    rig.worker.heartbeat()
    rig.turn()
    rig.now += 60.0
    rig.turn()
    assert rig.engine.counters.worker_losses == 0 and rig.engine.stats().ready
    rig.run()


def test_a_long_step_is_healthy_while_the_worker_shows_life():
    rig = Rig()
    fill(rig, 1)
    rig.engine.turn(0)
    for second in range(1, 40):
        rig.now += 1.0
        rig.worker.heartbeat(busy_micros=second * 1_000_000)
        rig.engine.turn(0)
        assert rig.engine.stats().healthy
    rig.run()


def test_an_idle_worker_that_does_not_run_its_plan_is_a_problem():
    rig = Rig()
    fill(rig, 1)
    rig.engine.turn(0)
    for _ in range(6):
        rig.now += 1.0
        rig.worker.heartbeat()
        rig.engine.turn(0)
    stats = rig.engine.stats()
    assert not stats.healthy and "rank 0 does not run plan 1" in stats.problem
    rig.run()
    assert rig.engine.stats().healthy


def test_a_step_beyond_its_deadline_costs_the_worker_its_place():
    rig = Rig()
    prompts = fill(rig, 1)
    rig.engine.turn(0)
    for _ in range(70):
        rig.now += 1.0
        rig.worker.heartbeat(busy_micros=1)
        rig.engine.turn(0)
    assert rig.engine.counters.worker_losses == 1
    rig.worker.hello()
    rig.run()
    verify(rig, prompts)


def test_a_lost_plan_is_a_gap_without_blame():
    rig = Rig()
    prompts = fill(rig, 2)
    for _ in range(3):
        rig.turn()
    rig.engine.turn(0)
    assert rig.worker.link.recv(0) is not None  # a frame is lost on the way
    rig.run()
    verify(rig, prompts)
    assert rig.engine.stats().epoch == 2
    assert all(rig.client[i].deaths == 0 for i in range(2))


def test_a_worker_that_refuses_everything_does_not_spin_for_ever():
    rig = Rig()
    fill(rig, 2)
    rig.worker.execute = lambda plan: step_pb2.StepResult(  # type: ignore[method-assign]
        epoch=plan.epoch, seq=plan.seq, worker_epoch=rig.worker.worker_epoch,
        status=step_pb2.STEP_STATUS_REFUSED, error="no",
    )  # fmt: skip
    for _ in range(200):
        rig.turn()
    assert {rig.client[i].error.name for i in range(2)} == {"request_crashed_worker"}


def test_a_second_hello_before_any_plan_is_welcomed_again():
    rig = Rig()
    rig.worker.hello()
    rig.turn()
    assert rig.worker.welcomes == [1, 1] and rig.engine.stats().epoch == 1


def test_blocks_still_held_by_name_serve_a_new_scheduler():
    first = Rig()
    prompt = list(range(3, 83))
    first.submit(prompt)
    first.run()
    assert len(first.worker.names) >= 5
    second = Rig(hello=False)
    second.worker = first.worker
    second.worker.link = second.link.worker()
    second.worker.hello()
    second.engine.turn(0)
    assert second.engine.stats().num_blocks_cached == len(first.worker.names)
    second.submit(prompt)
    second.run()
    assert second.client[0].num_cached_tokens == 64
    assert second.client[0].tokens == second.expected(prompt)[0]
    assert second.engine.stats().epoch == 2


def test_a_new_worker_process_holds_nothing():
    rig = Rig()
    prompt = list(range(3, 83))
    rig.submit(prompt)
    rig.run()
    rig.worker = FakeWorker(rig.link.worker(), rig.options)
    rig.worker.hello()
    rig.submit(prompt)
    rig.run()
    assert rig.client[1].num_cached_tokens == 0


def test_less_memory_after_a_restart_ends_what_does_not_fit():
    rig = Rig(Options(num_blocks=20))
    rig.submit([5, 6], max_tokens=200)
    rig.submit([5, 7], max_tokens=30)
    while len(rig.client[0].tokens) < 100:
        rig.turn()
    rig.worker.die()
    rig.worker = FakeWorker(rig.link.worker(), Options(num_blocks=4, max_slots=7))
    rig.worker.hello()
    rig.run()
    assert rig.client[0].reason == "length"
    assert rig.client[1].tokens == rig.expected([5, 7], max_tokens=30)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol_version": 99}, "protocol 99"),
        ({"block_size": 32}, "block size 32"),
        ({"digest": "11" * 16}, "model_digest"),
        ({"digest": "xyz"}, "hexadecimal"),
        ({"vocab_size": 5}, "vocab_size"),
        ({"max_slots": 1 << 20}, "max_slots"),
        ({"num_blocks": 1}, "num_blocks"),
        ({"rank": 3}, "rank 3"),
        ({"model": "another"}, "model 'another'"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(change, says):
    rig = Rig()
    prompts = fill(rig, 2)
    rig.turn()
    other = FakeWorker(rig.link.worker(), Options(**{"num_blocks": 64, **change}))
    other.hello()
    rig.turn()
    other.pump()
    assert says in other.refusal
    rig.run()
    verify(rig, prompts)
    assert rig.engine.stats().epoch == 1


def test_garbage_from_a_peer_is_counted_and_dropped():
    rig = Rig()
    prompts = fill(rig, 2)
    stranger = rig.link.worker()
    for frame in (
        b"\xff\xff\xff",
        b"x" * 1000,
        step_pb2.WorkerFrame().SerializeToString() + b"\x7a\x00",
    ):
        stranger.send(frame)
    stranger.send(
        step_pb2.WorkerFrame(result=step_pb2.StepResult(epoch=1, seq=1)).SerializeToString()
    )
    stranger.send(step_pb2.WorkerFrame(heartbeat=step_pb2.Heartbeat(epoch=1)).SerializeToString())
    rig.run()
    verify(rig, prompts)
    assert sum(rig.engine.counters.frames_dropped.values()) >= 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: setattr(r, "slots", b"\x01"),
        lambda r: setattr(r, "slots", r.slots + b"\x07\0\0\0"),
        lambda r: setattr(r, "num_outputs", b"\x09" * len(r.num_outputs)),
        lambda r: setattr(r, "token_ids", r.token_ids[:-4] + b"\xff\xff\xff\x7f"),
        lambda r: setattr(r, "finished", b""),
        lambda r: setattr(r.logprobs, "counts", b"\x01\0\0\0"),
    ],
)
def test_a_result_that_contradicts_its_plan_is_not_believed(spoil):
    rig = Rig()
    prompts = fill(rig, 3)
    run = rig.worker.execute
    spoiled: list[int] = []

    def execute(plan):
        result = run(plan)
        if rig.worker.num_steps == 5 and not spoiled:
            spoiled.append(plan.seq)
            spoil(result)
        return result

    rig.worker.execute = execute  # type: ignore[method-assign]
    rig.run()
    assert spoiled
    verify(rig, prompts)
    assert rig.engine.stats().epoch == 2


def test_a_row_that_fails_alone_does_not_harm_its_neighbours():
    rig = Rig()
    rig.options.row_error = lambda slot: "numeric_error" if slot.request_id == "r1" else ""
    prompts = fill(rig, 3)
    rig.run()
    verify(rig, prompts, skip={1})
    assert rig.client[1].error.name == "numeric_error"
    assert rig.engine.stats().epoch == 1


def test_blocks_a_failed_row_never_wrote_are_shared_with_nobody():
    rig = Rig(max_num_batched_tokens=512)
    rig.turn()
    rig.options.row_error = lambda slot: "unsupported" if slot.request_id == "r0" else ""
    prompt = list(range(3, 83))
    prompts = [prompt, [*prompt, 4], [*prompt, 5]]
    for each in prompts:
        rig.submit(each)
    rig.options.check_reads = False  # in these steps two requests read what was never written
    rig.engine.turn(0)
    rig.worker.pump()
    rig.options.check_reads = True
    rig.run()
    assert rig.client[0].error.name == "unsupported"
    assert rig.engine.stats().epoch == 2
    for i in (1, 2):
        assert rig.client[i].tokens == rig.expected(prompts[i])[0]


def test_a_group_of_two_ranks_is_ready_when_both_are_there():
    rig = Rig(Options(tp_size=2))
    assert not rig.engine.stats().ready and "rank 1" in rig.engine.stats().problem
    other = FakeWorker(rig.link.worker(), Options(tp_size=2, rank=1))
    other.hello()
    prompts = fill(rig, 3)
    for _ in range(60):
        rig.turn()
        other.pump()
    verify(rig, prompts)
    assert other.num_steps == rig.worker.num_steps and other.violations == []
    other.options.fail = lambda plan, worker: "rank 1 broke" if worker.num_steps == 40 else ""
    rig.engine.check()


def test_an_unreachable_worker_is_lost_at_once():
    rig = Rig()
    prompts = fill(rig, 2)
    rig.turn()
    send = rig.link.send
    rig.link.send = lambda peer, frame: False  # type: ignore[method-assign]
    for _ in range(3):
        rig.turn()
    stats = rig.engine.stats()
    assert not stats.ready and "can't be reached" in stats.problem
    rig.link.send = send  # type: ignore[method-assign]
    rig.worker.hello()
    rig.run()
    verify(rig, prompts)


def test_a_probe_finds_the_worker_whose_connection_went():
    rig = Rig()
    rig.turn()
    peer = rig.engine._driver.group.workers[0].peer
    assert isinstance(rig.link, QueueLink)
    rig.link._inbox.put((peer, b""))
    rig.turn()
    assert rig.engine.stats().ready  # still there: the beat went out
    rig.link.send = lambda peer, frame: False  # type: ignore[method-assign]
    rig.link._inbox.put((peer, b""))
    rig.turn()
    assert not rig.engine.stats().ready


def test_a_suspect_finds_room_among_those_set_aside_for_it():
    """The first half fills memory and is set aside; the second half must run all the same."""
    rig = Rig(Options(num_blocks=9), max_num_seqs=4)
    fail_once(rig, 22)
    prompts = [[7 + i] * 40 for i in range(2)]
    for prompt in prompts:
        rig.submit(prompt, max_tokens=60)
    rig.run()
    assert rig.engine.counters.failed_steps == 1
    verify(rig, prompts, max_tokens=60)


def test_a_failure_on_any_rank_ends_the_epoch():
    rig = Rig(Options(tp_size=2))
    other = FakeWorker(rig.link.worker(), Options(tp_size=2, rank=1))
    other.hello()
    failed: list[int] = []

    def fail(plan, worker) -> str:
        if worker.num_steps == 5 and not failed:
            failed.append(plan.seq)
            return "rank 1 broke"
        return ""

    other.options.fail = fail
    prompts = fill(rig, 3)
    for _ in range(100):
        rig.turn()
        other.pump()
    verify(rig, prompts)
    assert failed and rig.engine.stats().epoch >= 2
    assert rig.client[0].deaths == 1
    rig.engine.check()


def test_a_result_from_the_wrong_rank_is_not_taken():
    rig = Rig(Options(tp_size=2))
    other = FakeWorker(rig.link.worker(), Options(tp_size=2, rank=1))
    other.hello()
    prompts = fill(rig, 1)
    rig.engine.turn(0)
    other.pump()
    forged = step_pb2.StepResult(
        epoch=1, seq=1, worker_epoch=other.worker_epoch, status=step_pb2.STEP_STATUS_OK
    )
    other.send(step_pb2.WorkerFrame(result=forged))
    for _ in range(60):
        rig.turn()
        other.pump()
    verify(rig, prompts)
    assert rig.engine.counters.frames_dropped["wrong rank"] == 1


def test_one_group_of_suspects_follows_the_other_and_newcomers_come_last():
    rig = Rig()
    fail_once(rig, 5)
    prompts = fill(rig, 8, max_tokens=40)
    while not rig.engine.counters.failed_steps:
        rig.turn()
    rig.engine.cancel(rig.client, 1)  # a suspect that leaves does not hold the others up
    rig.run(until=7)
    verify(rig, prompts, skip={1}, max_tokens=40)
    assert [rig.client[i].deaths for i in (0, 2, 7)] == [1, 1, 1]


def test_a_worker_lost_while_suspects_are_on_probation():
    rig = Rig()
    fail_once(rig, 5)
    prompts = fill(rig, 6, max_tokens=40)
    while not rig.engine.counters.failed_steps:
        rig.turn()
    rig.turn(worker_frames=0)
    rig.worker.die()
    rig.worker = FakeWorker(rig.link.worker(), rig.options)
    rig.worker.hello()
    rig.run()
    verify(rig, prompts, max_tokens=40)
