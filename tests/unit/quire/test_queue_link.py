"""The in-process link keeps the contract that the ZeroMQ one has."""

from __future__ import annotations

import threading
import time

from quire.link import QueueLink


def test_frames_arrive_in_order_and_by_peer() -> None:
    link = QueueLink()
    first, second = link.worker(), link.worker()
    first.send(b"a")
    second.send(b"b")
    first.send(b"c")
    got = link.poll(1)
    peers = [peer for peer, _ in got]
    assert [frame for _, frame in got] == [b"a", b"b", b"c"]
    assert peers[0] == peers[2] != peers[1]
    assert link.send(peers[1], b"x") and link.send(peers[1], b"y")
    assert (second.recv(1), second.recv(1)) == (b"x", b"y")
    assert first.recv(0.01) is None


def test_an_unknown_peer_can_not_be_reached() -> None:
    assert QueueLink().send(b"nobody", b"x") is False


def test_poll_without_a_wait_returns_at_once() -> None:
    assert QueueLink().poll(0) == []


def test_wake_ends_a_poll() -> None:
    link = QueueLink()
    threading.Timer(0.05, link.wake).start()
    begin = time.monotonic()
    assert link.poll(30) == []
    assert time.monotonic() - begin < 10


def test_wake_before_a_poll_ends_the_next_one() -> None:
    link = QueueLink()
    link.wake()
    begin = time.monotonic()
    assert link.poll(30) == []
    assert time.monotonic() - begin < 10


def test_close_ends_a_recv() -> None:
    link = QueueLink()
    worker = link.worker()
    threading.Timer(0.05, link.close).start()
    assert worker.recv(30) is None
