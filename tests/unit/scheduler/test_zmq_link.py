"""The ROUTER end against plain DEALER sockets."""

from __future__ import annotations

import threading
import time

import pytest
import zmq
from sched_helpers import DealerLink, Waiter, submission

from fakes.worker import FakeWorker, Options, oracle
from quire.config import EngineConfig
from quire.errors import AddressInUse, ConfigError
from quire_scheduler.engine import Engine
from quire_scheduler.zmq_link import MAX_QUEUED, ZmqLink

KEEP: list[zmq.Socket] = []  # so that no socket is collected before its context is destroyed


@pytest.fixture
def link():
    made = ZmqLink("127.0.0.1:0")
    yield made
    made.close()


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(0)  # with all its sockets
    KEEP.clear()


def dealer(context: zmq.Context, link: ZmqLink, rcvhwm: int = 1000) -> zmq.Socket:
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.RCVHWM, rcvhwm)
    made.connect(link.endpoint)
    KEEP.append(made)
    return made


def poll_one(link: ZmqLink, seconds: float = 5.0) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for peer, frame in link.poll(0.1):
            if frame:
                return peer, frame
    raise AssertionError("nothing came")


def test_frames_go_both_ways(link, context):
    socket = dealer(context, link)
    socket.send(b"hello")
    peer, frame = poll_one(link)
    assert frame == b"hello"
    assert link.send(peer, b"welcome")
    assert socket.poll(5000) and socket.recv() == b"welcome"


def test_an_unknown_or_gone_peer_is_told_at_once(link, context):
    assert not link.send(b"nobody", b"x")
    socket = dealer(context, link)
    socket.send(b"hello")
    peer, _ = poll_one(link)
    socket.close(0)
    probes: list[tuple[bytes, bytes]] = []
    deadline = time.monotonic() + 5
    while (peer, b"") not in probes and time.monotonic() < deadline:
        probes += link.poll(0.1)
    assert (peer, b"") in probes  # the caller is asked to look, and may be ahead of the socket
    while link.send(peer, b"x"):
        assert time.monotonic() < deadline


def test_a_peer_that_does_not_read_is_bounded_and_nobody_waits(context):
    link = ZmqLink("127.0.0.1:0")
    try:
        socket = dealer(context, link, rcvhwm=1)
        socket.send(b"hello")
        peer, _ = poll_one(link)
        big = b"x" * (1 << 20)
        sent = 0
        begin = time.monotonic()
        while link.send(peer, big) and sent < 10 * MAX_QUEUED:
            sent += 1
        assert sent < 5 * MAX_QUEUED and time.monotonic() - begin < 10
    finally:
        link.close()


def test_wake_ends_a_poll_from_any_thread(link):
    threads = [threading.Thread(target=link.wake) for _ in range(8)]
    timer = threading.Timer(0.05, lambda: [t.start() for t in threads])
    timer.start()
    begin = time.monotonic()
    assert link.poll(10) == []
    assert time.monotonic() - begin < 5
    timer.join()
    for thread in threads:
        thread.join()


def test_malformed_multiparts_are_counted(link, context):
    socket = dealer(context, link)
    socket.send_multipart([b"a", b"b", b"c"])
    socket.send(b"good")
    assert poll_one(link)[1] == b"good"
    assert link.num_malformed == 1


def test_a_taken_address_is_an_error(link):
    with pytest.raises(AddressInUse, match="--step-address"):
        ZmqLink(link.endpoint)
    with pytest.raises(ConfigError, match="--step-address"):
        ZmqLink("nonsense")


def test_an_engine_over_zeromq_survives_the_loss_of_its_worker(link, context):
    engine = Engine(EngineConfig(), link)
    engine.start()
    options = Options(num_blocks=512, latency=lambda n: 0.002)
    first = FakeWorker(DealerLink(context, link.endpoint), options)
    first.start()
    try:
        waiter = Waiter(4)
        for i in range(4):
            engine.submit(waiter, submission(i, [5 + i], max_tokens=150))
        deadline = time.monotonic() + 10
        while len(waiter[0].tokens) < 10 and time.monotonic() < deadline:
            time.sleep(0.002)
        first.die()
        first.stop()
        first.link.close()
        while engine.stats().ready and time.monotonic() < deadline:
            time.sleep(0.002)
        assert "rank 0" in engine.stats().problem  # noticed by its socket, it sent no heartbeats
        second = FakeWorker(DealerLink(context, link.endpoint), options)
        second.start()
        assert waiter.done.wait(20)
        for i in range(4):
            assert waiter[i].tokens == oracle([5 + i], seed=7, max_tokens=150)[0]
        engine.check()
        assert second.violations == []
        second.stop()
        second.link.close()
    finally:
        engine.stop()
