"""The worker's loop over both links: hello, plans, heartbeats, a scheduler that goes and comes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import zmq
from runtime_fakes import HashModel, Planner, i32, make_runner, reference_greedy

from quire.errors import StartupError
from quire.link import QueueLink
from quire.v1 import step_pb2 as pb
from quire_worker import daemon
from quire_worker.zmq_link import ZmqLink

PROMPT = [5, 17, 3, 3, 60]


class StubWorker:
    """A runner with a face."""

    def __init__(self, model=None) -> None:
        self.runner = make_runner(model=model)
        self.fatal = ""
        self.dropped = 0

    @property
    def highest_epoch(self):
        return self.runner.gate.highest_epoch

    def hello(self):
        ids, names = self.runner.transfer.names.held()
        return pb.Hello(
            worker_epoch=7, highest_epoch=self.runner.gate.highest_epoch, held_block_ids=ids,
            held_block_names=names,
        )  # fmt: skip

    def execute(self, plan, received_ns=None):
        return self.runner.execute(plan, received_ns)

    def heartbeat(self):
        started = self.runner.started_ns
        busy = time.monotonic_ns() - started if started else 0
        return pb.Heartbeat(epoch=self.runner.gate.epoch, busy_micros=busy // 1000, metrics=b"page")

    def frame_dropped(self):
        self.dropped += 1


class QueueScheduler:
    def __init__(self):
        self.link = QueueLink()
        self.worker_link = self.link.worker()
        self.peer = b"thread-0"

    def poll(self, timeout):
        return [frame for _, frame in self.link.poll(timeout)]

    def send_bytes(self, frame):
        assert self.link.send(self.peer, frame)

    def close(self):
        self.link.close()


class ZmqScheduler:
    """A ROUTER on a free port, or on one given."""

    def __init__(self, port=None):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if port is None:
            self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        else:
            self.port = port
            self.socket.bind(f"tcp://127.0.0.1:{port}")
        self.peer = None

    @property
    def worker_link(self):
        return ZmqLink(f"127.0.0.1:{self.port}")

    def poll(self, timeout):
        if not self.socket.poll(timeout * 1000):
            return []
        self.peer, frame = self.socket.recv_multipart()
        return [frame]

    def send_bytes(self, frame):
        self.socket.send_multipart([self.peer, frame])

    def close(self):
        self.socket.close()
        self.context.term()


class Session:
    """A worker's loop in a thread, and a scheduler to speak to it."""

    def __init__(self, scheduler, worker=None):
        self.scheduler = scheduler
        self.worker = worker or StubWorker()
        self.stop = threading.Event()
        self.error = None
        self.pending = []
        self.thread = threading.Thread(target=self._serve, args=(scheduler.worker_link,))
        self.thread.start()

    def _serve(self, link):
        try:
            daemon.serve(self.worker, link, self.stop)
        except Exception as error:
            self.error = error

    def next(self, kind, timeout=10.0):
        """The next frame of that kind; others are skipped."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            while self.pending:
                message = pb.WorkerFrame.FromString(self.pending.pop(0))
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)
            self.pending += self.scheduler.poll(0.1)
        raise AssertionError(f"no {kind} within {timeout} s")

    def send(self, **message):
        self.scheduler.send_bytes(pb.SchedulerFrame(**message).SerializeToString())

    def greet(self):
        hello = self.next("hello")
        self.send(welcome=pb.Welcome(epoch=hello.highest_epoch + 1))
        return hello

    def end(self):
        self.stop.set()
        self.thread.join(5)
        self.scheduler.close()
        assert not self.thread.is_alive()


@pytest.fixture(params=[QueueScheduler, ZmqScheduler])
def session(request):
    session = Session(request.param())
    yield session
    session.end()


@pytest.fixture
def quick(monkeypatch):
    """Short times, so that silence needs no waiting."""
    monkeypatch.setattr(daemon, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(daemon, "SILENCE_S", 0.3)
    monkeypatch.setattr(daemon, "_POLL_S", 0.02)


def test_plans_are_answered_in_order(session):
    assert session.greet().worker_epoch == 7
    planner = Planner(session.worker.runner)
    plans = [planner.plan({0: 5}, admit=[planner.admit(0, PROMPT)])]
    plans += [planner.plan({0: 1}) for _ in range(5)]
    for plan in plans:
        session.send(plan=plan)
    for seq in range(1, 7):
        result = session.next("result")
        assert (result.seq, result.status) == (seq, pb.STEP_STATUS_OK)
        planner.read(result)
    assert planner.outputs[0] == reference_greedy(PROMPT, 6)


@pytest.mark.parametrize("scheduler", [QueueScheduler, ZmqScheduler])
def test_heartbeats_come_during_a_long_step_and_the_next_plan_is_stamped_on_arrival(
    quick, scheduler
):
    model, go = HashModel(), threading.Event()
    forward = model.forward
    model.forward = lambda *args: (go.wait(10), forward(*args))[1]
    session = Session(scheduler(), StubWorker(model))
    try:
        session.greet()
        planner = Planner(session.worker.runner)
        session.send(plan=planner.plan({0: 5}, admit=[planner.admit(0, PROMPT)]))
        session.send(plan=planner.plan({0: 1}))
        while not (beat := session.next("heartbeat")).busy_micros:
            pass
        later = session.next("heartbeat")
        assert later.busy_micros > beat.busy_micros and later.metrics == b"page"
        go.set()
        assert session.next("result").seq == 1
        second = session.next("result")
        assert second.seq == 2 and second.timings.queue_micros > 20_000
        assert session.error is None
    finally:
        go.set()
        session.end()


def test_a_refused_worker_ends_with_the_reason(session):
    session.next("hello")
    session.send(refusal=pb.Refusal(reason="model digest ab is not cd"))
    session.thread.join(5)
    assert isinstance(session.error, StartupError)
    assert "model digest ab is not cd" in str(session.error)


def test_shutdown_ends_the_loop(session):
    session.greet()
    session.send(shutdown=pb.Shutdown(reason="bye"))
    session.thread.join(5)
    assert not session.thread.is_alive() and session.error is None


def test_a_lost_device_ends_the_loop_after_the_answer(session):
    session.greet()
    session.worker.fatal = "the device is lost"
    session.send(plan=pb.StepPlan(epoch=1, seq=1))
    assert session.next("result").seq == 1
    session.thread.join(5)
    assert "lost" in str(session.error)


def test_frames_that_make_no_sense_are_dropped(session):
    session.greet()
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 300):
        session.scheduler.send_bytes(b"\xff" + rng.bytes(size))
    session.send(plan=pb.StepPlan(epoch=1, seq=1))
    assert session.next("result").status == pb.STEP_STATUS_OK
    assert session.worker.dropped == 4


def test_hello_is_repeated_until_somebody_answers(quick):
    session = Session(QueueScheduler())
    for _ in range(3):
        session.next("hello")
    session.end()


def test_a_silent_scheduler_is_greeted_again(quick):
    session = Session(QueueScheduler())
    session.greet()
    session.send(heartbeat=pb.Heartbeat(epoch=1))
    session.next("hello")
    session.end()


def test_a_step_longer_than_the_silence_is_no_reason_to_greet(quick):
    model, go = HashModel(), threading.Event()
    forward = model.forward
    model.forward = lambda *args: (go.wait(10), forward(*args))[1]
    session = Session(QueueScheduler(), StubWorker(model))
    session.greet()
    planner = Planner(session.worker.runner)
    session.send(plan=planner.plan({0: 5}, admit=[planner.admit(0, PROMPT)]))
    while session.next("heartbeat").busy_micros < 400_000:  # longer than SILENCE_S
        session.send(heartbeat=pb.Heartbeat(epoch=1))
    session.send(heartbeat=pb.Heartbeat(epoch=1))
    go.set()
    session.next("result")
    session.send(plan=planner.plan({0: 1}))
    frames = [session.pending.pop(0) for _ in range(len(session.pending))]
    while not any(pb.WorkerFrame.FromString(f).HasField("result") for f in frames):
        frames += session.scheduler.poll(1)
    assert not any(pb.WorkerFrame.FromString(f).HasField("hello") for f in frames)
    session.end()


def test_a_scheduler_that_has_forgotten_the_epoch_is_greeted_again(quick):
    session = Session(QueueScheduler())
    session.greet()
    session.send(plan=pb.StepPlan(epoch=1, seq=1))
    session.next("result")
    session.send(heartbeat=pb.Heartbeat(epoch=0))
    assert session.next("hello", timeout=0.28).highest_epoch == 1
    session.end()


def test_a_scheduler_that_has_given_the_worker_up_is_greeted_at_once(session):
    """A heartbeat of epoch 0 says: who are you?"""
    session.greet()
    session.send(heartbeat=pb.Heartbeat(epoch=0))
    begin = time.monotonic()
    session.next("hello")
    assert time.monotonic() - begin < daemon.SILENCE_S


def test_a_step_far_beyond_its_deadline_is_told(quick, monkeypatch):
    monkeypatch.setattr(daemon, "HUNG_S", 0.2)
    model, go, told = HashModel(), threading.Event(), []
    forward = model.forward
    model.forward = lambda *args: (go.wait(10), forward(*args))[1]
    scheduler, worker, stop = QueueScheduler(), StubWorker(model), threading.Event()
    thread = threading.Thread(
        target=daemon.serve, args=(worker, scheduler.worker_link, stop, told.append)
    )
    planner = Planner(worker.runner)
    plan = planner.plan({0: 5}, admit=[planner.admit(0, PROMPT)])
    plan.deadline_ms = 50
    thread.start()
    try:
        scheduler.send_bytes(pb.SchedulerFrame(plan=plan).SerializeToString())
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.01)
        assert "outlived its deadline" in told[0]
        go.set()
        while worker.runner.gate.last_seq != 1 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        count = len(told)
        time.sleep(0.3)
        assert len(told) == count  # it is over
    finally:
        go.set()
        stop.set()
        thread.join(5)
        scheduler.close()


def test_a_link_that_breaks_ends_the_loop(monkeypatch):
    scheduler = ZmqScheduler()
    session = Session(scheduler)
    session.greet()
    try:
        monkeypatch.setattr(ZmqLink, "_receive", lambda self: 1 / 0)
        session.send(heartbeat=pb.Heartbeat(epoch=1))
        session.thread.join(5)
        assert "broke" in str(session.error)
    finally:
        session.end()


def test_a_worker_outlives_its_scheduler():
    first = ZmqScheduler()
    session = Session(first)
    session.greet()
    planner = Planner(session.worker.runner)
    named = {"named_block_ids": i32(0), "block_names": b"n" * 16}
    session.send(plan=planner.plan({0: 5}, admit=[planner.admit(0, PROMPT)], **named))
    session.next("result")
    first.close()
    session.scheduler = ZmqScheduler(first.port)
    hello = session.greet()
    assert hello.highest_epoch == 1
    assert (hello.held_block_ids, hello.held_block_names) == (i32(0), b"n" * 16)
    again = Planner(session.worker.runner, epoch=2)
    again.free = [9, 10]
    admit = [again.admit(0, PROMPT, computed=4, blocks=[0])]
    session.send(plan=again.plan({0: 1}, admit=admit))
    result = session.next("result")
    assert (result.epoch, result.status) == (2, pb.STEP_STATUS_OK)
    again.read(result)
    assert again.outputs[0] == reference_greedy(PROMPT, 1)
    session.end()


def test_a_worker_may_start_before_its_scheduler():
    probe = ZmqScheduler()
    port = probe.port
    link = probe.worker_link
    probe.close()
    worker = StubWorker()
    late = type("Late", (), {"worker_link": link, "close": lambda self: None})()
    session = Session(late, worker)
    session.scheduler = ZmqScheduler(port)
    session.greet()
    session.end()


def test_a_closed_link_ends_at_once():
    link = ZmqLink("127.0.0.1:1")
    begin = time.monotonic()
    link.close()
    link.close()
    link.send(b"late")
    assert link.recv(1.0) is None and time.monotonic() - begin < 3
