"""The engine's face: submit, cancel, detach, drain, and how streams end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from sched_helpers import Collector, Rig, Waiter, submission

from fakes.worker import FakeWorker, Options, embedding, oracle
from quire.config import EngineConfig
from quire.link import QueueLink
from quire.sampling import SamplingParams
from quire.v1 import common_pb2
from quire_scheduler.engine import Engine, Submission


def test_a_stream_equals_the_oracle():
    rig = Rig()
    rig.submit([5, 6, 7], max_tokens=20)
    rig.run()
    assert (rig.client[0].tokens, rig.client[0].reason) == rig.expected([5, 6, 7], max_tokens=20)


def test_eos_ends_a_stream_and_names_the_token():
    rig = Rig(Options(eos_every=6))
    for i in range(10):
        rig.submit([5 + i], max_tokens=60)
    rig.run()
    for i in range(10):
        tokens, reason = rig.expected([5 + i], max_tokens=60)
        stream = rig.client[i]
        assert (stream.tokens, stream.reason) == (tokens, reason)
        assert stream.stop_token_id == (tokens[-1] if reason == "stop" else -1)
    assert {rig.client[i].reason for i in range(10)} >= {"stop"}


def test_ignore_eos_and_stop_token_ids():
    rig = Rig(Options(eos_every=4))
    prompt = [5]
    plain, _ = rig.expected(prompt, max_tokens=30, ignore_eos=True)
    stop = next(t for t in plain[4:] if t != 2)
    rig.submit(prompt, max_tokens=30, ignore_eos=True)
    rig.submit(prompt, max_tokens=30, ignore_eos=True, stop_token_ids=[stop])
    rig.run()
    assert (rig.client[0].tokens, rig.client[0].reason) == (plain, "length")
    assert rig.client[1].tokens == plain[: plain.index(stop) + 1]
    assert (rig.client[1].reason, rig.client[1].stop_token_id) == ("stop", stop)


def test_without_max_tokens_the_context_ends_it():
    rig = Rig(Options(max_model_len=64))
    rig.submit([5] * 30, max_tokens=None)
    rig.run()
    assert rig.client[0].reason == "length" and len(rig.client[0].tokens) == 34


def test_usage_counts_the_first_admission():
    rig = Rig()
    prompt = list(range(3, 43))
    rig.submit(prompt)
    rig.run()
    rig.submit(prompt)
    rig.run()
    assert [rig.client[i].num_cached_tokens for i in (0, 1)] == [0, 32]


@pytest.mark.parametrize(
    ("delivered", "params", "reason"),
    [
        ([9, 2], {"max_tokens": 9}, "stop"),
        ([9, 8], {"max_tokens": 9, "stop_token_ids": [8]}, "stop"),
        ([9, 8], {"max_tokens": 2}, "length"),
        ([9] * 9, {"max_tokens": None}, "length"),
    ],
)
def test_delivered_tokens_that_meet_a_finish_are_answered_with_the_finish_alone(
    delivered, params, reason
):
    rig = Rig(Options(max_model_len=12))
    rig.submit([5, 6, 7], attempt=1, output_token_ids=delivered, **params)
    rig.run()
    assert (rig.client[0].tokens, rig.client[0].reason) == ([], reason)
    assert rig.worker.num_steps == 0


def test_a_resubmission_goes_on_where_it_stopped():
    rig = Rig()
    tokens, reason = rig.expected([5, 6], max_tokens=20)
    rig.submit([5, 6], attempt=1, output_token_ids=tokens[:7], max_tokens=20)
    rig.run()
    assert (rig.client[0].tokens, rig.client[0].reason) == (tokens[7:], reason)
    assert rig.client[0].first_index == 7


def test_a_higher_attempt_replaces_and_a_lower_one_is_ignored():
    rig = Rig()
    rig.submit([5, 6], handle=0, max_tokens=50)
    rig.turn()
    rig.submit([5, 6], handle=0, attempt=1, max_tokens=3)
    rig.submit([5, 6], handle=0, attempt=0, max_tokens=9)
    got: list[tuple[int, int]] = []
    plain = rig.client.deliver

    def deliver(outputs):
        got.extend(zip(outputs.handles.tolist(), outputs.attempts.tolist(), strict=True))
        if got[-1][1] == 1 and len([g for g in got if g[1] == 1]) == 1:
            rig.client.streams.clear()
        plain(outputs)

    rig.client.deliver = deliver
    for _ in range(20):
        rig.turn()
    attempts = [a for _, a in got]
    assert attempts == sorted(attempts) and attempts.count(1) == 3
    rig.settle()


def test_a_cancelled_request_is_absent_from_the_next_plan():
    rig = Rig()
    rig.worker.keep_plans = True
    rig.submit([5, 6, 7], max_tokens=400)
    rig.submit([8, 9], max_tokens=40)
    for _ in range(4):
        rig.turn()
    sent = rig.engine._driver.seq
    rig.engine.cancel(rig.client, 0)
    before = len(rig.client[0].tokens)
    rig.run(until=1)
    later = [p for p in rig.worker.plans if p.seq > sent]
    assert later and all(0 not in np.frombuffer(p.slots, "<i4") for p in later)
    assert len(rig.client[0].tokens) == before and rig.client[0].reason is None
    assert rig.engine.stats().num_blocks_used == 0


def test_detach_cancels_all_of_a_client_and_nobody_else():
    rig = Rig()
    other = Collector()
    rig.submit([5, 6, 7], max_tokens=100)
    rig.submit([5, 6, 8], max_tokens=30, handle=0, client=other)
    rig.turn()
    rig.engine.detach(rig.client)
    for _ in range(60):
        rig.turn()
    assert rig.client[0].reason is None
    assert other[0].tokens == rig.expected([5, 6, 8], max_tokens=30)[0]
    rig.settle()


def test_a_client_that_raises_loses_only_itself():
    rig = Rig()

    class Broken:
        def deliver(self, outputs):
            raise RuntimeError("no")

    rig.submit([5], client=Broken(), handle=9, max_tokens=50)
    rig.submit([6], handle=0, max_tokens=5)
    rig.submit([7], handle=1, max_tokens=5)
    rig.run(until=2)
    assert rig.engine.stats().num_running == 0


def test_outputs_are_split_by_client():
    rig = Rig()
    clients = [Collector() for _ in range(3)]
    for i in range(9):
        rig.submit([5 + i], handle=i, client=clients[i % 3], max_tokens=6)
    for _ in range(30):
        rig.turn()
    for i in range(9):
        assert clients[i % 3][i].tokens == rig.expected([5 + i], max_tokens=6)[0]
    assert all(len(c.streams) == 3 for c in clients)


def test_logprobs_travel_with_their_tokens_and_only_to_who_asked():
    rig = Rig()
    rig.submit([5], max_tokens=4, logprobs=3)
    rig.submit([6], max_tokens=4)
    other = Collector()
    rig.submit([7], handle=0, client=other, max_tokens=4)
    rig.run(until=2)
    assert rig.client[0].logprob_counts == [4] * 4
    assert rig.client[1].logprob_counts == [0] * 4
    assert other[0].logprob_counts in ([], [0] * 4)


def test_a_request_that_pools_gets_one_vector_among_requests_that_generate():
    rig = Rig(max_num_batched_tokens=16)
    prompts = [list(range(5, 5 + n)) for n in (1, 16, 40)]
    for handle, prompt in enumerate(prompts):
        rig.submit(prompt, handle=handle, kind=common_pb2.REQUEST_KIND_POOL)
    rig.submit([7], handle=9, max_tokens=8)
    rig.run(until=4)
    for handle, prompt in enumerate(prompts):
        assert rig.client[handle].embedding == embedding(prompt)
        assert rig.client[handle].reason == "stop" and not rig.client[handle].tokens
    assert rig.client[9].tokens == rig.expected([7], max_tokens=8)[0]
    rig.engine.check()


@pytest.mark.parametrize(
    ("prompt", "rest", "name", "says"),
    [
        ([], {}, "invalid_request", "at least one token"),
        ([5, 997], {}, "invalid_request", "997"),
        ([5, -1], {}, "invalid_request", "-1"),
        ([5] * 512, {}, "context_length_exceeded", "512"),
        ([5], {"temperature": float("nan")}, "invalid_request", "temperature"),
        ([5], {"max_tokens": 0}, "invalid_request", "max_tokens"),
        ([5], {"stop_token_ids": [5000]}, "invalid_request", "stop_token_ids"),
        ([5], {"n": 2}, "invalid_request", "n is"),
        ([5], {"prompt_logprobs": 1}, "unsupported", "prompt_logprobs"),
        ([5], {"adapter": "x"}, "unsupported", "Adapters"),
        ([5], {"kind": 9}, "invalid_request", "kind"),
        ([5], {"multimodal": b"x"}, "unsupported", "text"),
        ([5], {"priority": 1 << 40}, "invalid_request", "priority"),
        ([5], {"cache_salt": "x" * 600}, "invalid_request", "cache_salt"),
        ([5], {"handle": 1 << 40}, "invalid_request", "32-bit"),
    ],
)
def test_bad_submissions_are_answered_and_counted(prompt, rest, name, says):
    rig = Rig()
    rig.submit(prompt, **rest)
    rig.turn()
    (stream,) = rig.client.streams.values()
    assert stream.reason == "error" and stream.error.name == name
    assert says in stream.error.message or says == stream.error.param
    assert rig.engine.counters.rejected == {name: 1}
    rig.submit([5], handle=77)
    rig.run(until=2)


def test_a_submission_of_wrong_types_does_not_stop_the_loop():
    rig = Rig()
    rig.submit([5], temperature="hot")
    rig.engine.submit(
        rig.client,
        Submission(handle=5, prompt_token_ids="abc", params=SamplingParams()),  # type: ignore
    )
    rig.submit([5], handle=6)
    rig.num_submitted = 3
    rig.run()
    assert rig.client[0].reason == rig.client[5].reason == "error"
    assert rig.client[6].reason == "length"


def test_a_full_queue_refuses_with_the_time_to_wait():
    rig = Rig(max_num_seqs=1, max_waiting=2)
    for i in range(5):
        rig.submit([5 + i], max_tokens=20)
    rig.turn()
    refused = [rig.client[i].error for i in (3, 4)]
    assert [e.name for e in refused] == ["queue_full"] * 2
    assert all(e.retry_after_s >= 0.05 for e in refused)
    rig.submit([9], attempt=1, handle=50)  # a resubmission was accepted before
    rig.run()
    assert rig.client[50].reason == "length"


def test_retry_after_follows_the_rate_while_busy_and_not_that_of_arrivals():
    rig = Rig(max_num_seqs=1, max_waiting=0)
    for _ in range(10):
        rig.submit([5], max_tokens=2)
        rig.turn()
        rig.now += 2.0  # so long does one take
        rig.run()
        rig.now += 600.0  # nobody asks for ten minutes
    rig.submit([5], max_tokens=200)
    rig.submit([6])
    rig.submit([7])
    rig.turn()
    first, second = (rig.client[i].error.retry_after_s for i in (11, 12))
    assert 1.5 < first < 2.5 and second == pytest.approx(2 * first, rel=0.2)


def test_a_request_of_several_is_taken_whole_or_refused_whole():
    rig = Rig(max_num_seqs=2, max_waiting=3)
    for left in (2, 1, 0):
        rig.submit([5], max_tokens=4, num_more=left)
    for left in (2, 1, 0):  # room for two, three are wanted
        rig.submit([7], num_more=left)
    for left in (1, 0):
        rig.submit([8], max_tokens=4, num_more=left)
    for left in (5, 4):  # never
        rig.submit([9], num_more=left)
    rig.run()
    reasons = [rig.client[i].reason for i in range(10)]
    assert reasons == ["length"] * 3 + ["error"] * 3 + ["length"] * 2 + ["error"] * 2
    assert {rig.client[i].error.name for i in (3, 4, 5)} == {"queue_full"}
    assert "6 sequences" in rig.client[8].error.message
    assert rig.client[9].error.name == "invalid_request"


def test_only_those_that_follow_a_refused_one_are_refused_with_it():
    rig = Rig(max_num_seqs=2, max_waiting=0)
    rig.submit([5], max_tokens=4)
    rig.submit([6], num_more=2)
    rig.submit([7], max_tokens=4)  # not what was announced: a request of its own
    rig.run()
    assert [rig.client[i].reason for i in range(3)] == ["length", "error", "length"]


def test_max_requests_bounds_running_and_waiting():
    rig = Rig(max_requests=2)
    for i in range(3):
        rig.submit([5 + i], max_tokens=9)
    rig.run()
    assert [rig.client[i].reason for i in range(3)] == ["length", "length", "error"]


def test_submissions_before_the_first_hello_wait_for_it():
    rig = Rig(hello=False)
    rig.submit([5, 6])
    rig.submit([7])
    rig.submit([8], handle=2)
    for _ in range(3):
        rig.turn()
    stats = rig.engine.stats()
    assert (stats.num_waiting, stats.ready, rig.engine.model()) == (3, False, None)
    assert "rank 0" in stats.problem
    rig.engine.cancel(rig.client, 2)
    rig.worker.hello()
    rig.run(until=2)
    assert rig.client[0].tokens == rig.expected([5, 6])[0]
    assert rig.client[2].reason is None


def test_two_plans_are_in_flight_and_never_three():
    rig = Rig()
    rig.submit([5], max_tokens=50)
    rig.engine.turn(0)
    rig.engine.turn(0)
    assert [p.seq for p in rig.engine._driver.state.in_flight] == [1, 2]
    rig.run()


def test_the_second_plan_leaves_just_in_time():
    costs = [(1, 1, 50_000), (512, 512, 50_000), (1, 4096, 50_000)]
    rig = Rig(Options(step_costs=costs))
    driver = rig.engine._driver
    rig.submit([5], max_tokens=50)
    rig.engine.turn(0)
    assert len(driver.state.in_flight) == 1
    rig.submit([6], max_tokens=50)  # a newcomer joins the next plan, which has not left
    rig.now += 0.040
    rig.engine.turn(0)
    assert len(driver.state.in_flight) == 1
    rig.now += 0.0085
    rig.engine.turn(0)
    assert len(driver.state.in_flight) == 2
    assert [r.request_id for r, _ in driver.state.in_flight[1].admitted] == ["r1"]
    assert driver.next_due(rig.now) > 0.01
    rig.run()


def test_late_and_doubled_results_are_dropped():
    rig = Rig()
    rig.submit([5], max_tokens=6)
    rig.turn()
    rig.turn()
    old = rig.worker.results[0]
    from quire.v1 import step_pb2

    for _ in range(3):
        rig.worker.send(step_pb2.WorkerFrame(result=old))
    rig.run()
    assert rig.client[0].tokens == rig.expected([5], max_tokens=6)[0]
    dropped = rig.engine.counters.frames_dropped
    assert dropped.get("duplicate", 0) + dropped.get("stale", 0) == 3


def threaded(options: Options | None = None, **config):
    link = QueueLink()
    engine = Engine(EngineConfig(**config), link)
    worker = FakeWorker(link.worker(), options or Options(num_blocks=512, max_slots=40))
    engine.start()
    worker.start()
    return engine, worker


def test_in_threads_many_clients_stream_at_once():
    engine, worker = threaded()
    try:
        waiters = [Waiter(8) for _ in range(4)]

        def client(waiter: Waiter) -> None:
            for i in range(8):
                engine.submit(waiter, submission(i, [5 + i, 9], max_tokens=30))

        threads = [threading.Thread(target=client, args=(w,)) for w in waiters]
        for thread in threads:
            thread.start()
        for waiter in waiters:
            assert waiter.done.wait(20)
            for i in range(8):
                assert waiter[i].tokens == oracle([5 + i, 9], seed=7, max_tokens=30)[0]
        for waiter in waiters:
            engine.detach(waiter)
        engine.check()
        assert worker.violations == []
        assert engine.stats().num_requests == 32
    finally:
        worker.stop()
        engine.stop()
    assert not engine.alive


def test_drain_waits_for_the_running_and_refuses_newcomers():
    options = Options(num_blocks=512, latency=lambda tokens: 0.002)
    engine, worker = threaded(options)
    try:
        waiter = Waiter(1)
        engine.submit(waiter, submission(0, [5], max_tokens=60))
        left: list[int] = []
        thread = threading.Thread(target=lambda: left.append(engine.drain(20)))
        thread.start()
        while not engine.stats().draining:
            time.sleep(0.001)
        engine.submit(waiter, submission(1, [5], max_tokens=2))
        thread.join(20)
        assert left == [0]
        assert len(waiter[0].tokens) == 60 and waiter[1].error.name == "draining"
    finally:
        worker.stop()
        engine.stop()


def test_drain_says_how_many_are_left():
    options = Options(num_blocks=512, latency=lambda tokens: 0.01)
    engine, worker = threaded(options)
    try:
        waiter = Waiter(1)
        engine.submit(waiter, submission(0, [5], max_tokens=500))
        assert engine.drain(0.1) == 1
    finally:
        worker.stop()
        engine.stop()


def test_a_crash_of_the_loop_is_told():
    engine, worker = threaded()
    told = threading.Event()
    engine.on_crash = told.set
    try:
        engine._post(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        assert told.wait(10)
        stats = engine.stats()
        assert not stats.healthy and "ZeroDivisionError" in stats.problem
        with pytest.raises(RuntimeError):
            engine._call(lambda: 1)
    finally:
        worker.stop()
        engine.stop()


def test_the_books_are_checked_after_each_spell_of_work():
    rig = Rig()
    rig.submit([5])
    rig.run()
    checks: list[float] = []
    rig.engine._check = lambda: checks.append(rig.now)  # type: ignore[method-assign]
    for _ in range(20):
        rig.now += 0.3
        rig.engine.turn(0)
    assert len(checks) == 1


def test_a_request_that_died_elsewhere_runs_apart():
    rig = Rig()
    rig.worker.keep_plans = True
    rig.submit([5], max_tokens=9)
    rig.submit([6], max_tokens=9, deaths=1, attempt=1)
    rig.run()
    first = rig.worker.plans[0]
    assert [a.request_id for a in first.admit] == ["r1"]
    assert rig.client[1].deaths == 1
