"""Link: how encoded step frames travel between a scheduler and its workers.

Two implementations: ZeroMQ (quire_scheduler.zmq_link, quire_worker.zmq_link) between
processes, and the queues here between two threads of one process. A link knows bytes
and peers; what a frame says is the ends' business.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Protocol


class SchedulerLink(Protocol):
    """The scheduler's end: many workers, told apart by an opaque peer name."""

    num_malformed: int  # messages that came in another shape than (peer, frame), and were dropped

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue one frame for the peer. False when it can't be reached or does not read."""

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """All (peer, frame) that have arrived; waits up to timeout_s for the first one.
        Returns early, perhaps empty, after wake()."""

    def wake(self) -> None:
        """End a poll() from another thread, now or the next one."""

    def close(self) -> None:
        """Let go of the socket; frames not yet sent are dropped."""


class WorkerLink(Protocol):
    """A worker's end: one scheduler."""

    def send(self, frame: bytes) -> None:
        """Queue one frame."""

    def recv(self, timeout_s: float) -> bytes | None:
        """The next frame in order, or None when none came in time or the link was closed."""

    def close(self) -> None:
        """Let go of the socket; recv() then returns None."""


class QueueLink:
    """The scheduler's end of an in-process link; `worker()` makes a worker's end."""

    def __init__(self) -> None:
        self.num_malformed = 0  # a queue carries nothing else
        self._inbox: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._peers: dict[bytes, queue.SimpleQueue[tuple[int, bytes] | None]] = {}
        self._lock = threading.Lock()

    def worker(self) -> QueueWorkerLink:
        """A new peer's end."""
        with self._lock:
            peer = b"thread-%d" % len(self._peers)
            outbox: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
            self._peers[peer] = outbox
        return QueueWorkerLink(peer, self._inbox, outbox)

    def send(self, peer: bytes, frame: bytes) -> bool:
        outbox = self._peers.get(peer)
        if outbox is None:
            return False
        outbox.put((time.monotonic_ns(), frame))
        return True

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        frames = []
        try:
            item = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get(False)
            while True:
                if item is not None:
                    frames.append(item)
                item = self._inbox.get(False)
        except queue.Empty:
            return frames

    def wake(self) -> None:
        self._inbox.put(None)

    def close(self) -> None:
        for outbox in self._peers.values():
            outbox.put(None)


class QueueWorkerLink:
    """A worker thread's end of a QueueLink."""

    def __init__(
        self,
        peer: bytes,
        inbox: queue.SimpleQueue[tuple[bytes, bytes] | None],
        outbox: queue.SimpleQueue[tuple[int, bytes] | None],
    ) -> None:
        self.received_ns = 0  # monotonic arrival time of the frame recv() gave last
        self._peer = peer
        self._inbox = inbox
        self._outbox = outbox

    def send(self, frame: bytes) -> None:
        self._inbox.put((self._peer, frame))

    def recv(self, timeout_s: float) -> bytes | None:
        try:
            item = self._outbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if item is None:
            return None
        self.received_ns, frame = item
        return frame

    def close(self) -> None:
        self._outbox.put(None)
