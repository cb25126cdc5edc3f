"""ZmqLink: a worker's end of the ZeroMQ link, a DEALER owned by one I/O thread.

Knows bytes and the connection's state, not what a frame says. The socket connects by itself
again when the scheduler is back; `generation` counts the connections, so that the owner can
introduce itself anew. Frames that arrive while a step runs are taken off the wire and stamped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from quire.liveness import INTERVAL_S, Pulse

log = logging.getLogger("quire.worker")

MAX_FRAME_BYTES = 256 << 20
_RECONNECT_MS, _RECONNECT_MAX_MS = 20, 100
_STUCK_MS = 500  # a send waits for the I/O thread at most so long: it may have ended


class ZmqLink:
    """Implements quire.link.WorkerLink. `send` may be called from any thread, `recv` from one."""

    def __init__(self, address: str, pulse: Pulse | None = None) -> None:
        """address: 'host:port' or a full ZeroMQ endpoint of the scheduler. The I/O thread beats
        the pulse, since no step ever holds it up."""
        self.endpoint = address if "://" in address else f"tcp://{address}"
        self.received_ns = 0  # monotonic arrival time of the frame recv() gave last
        self.connected = False
        self.generation = 0
        self._inbox: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._closed = threading.Event()
        self._broken = False  # the I/O thread ended without being told to
        self._pulse = pulse or Pulse(None)
        self._send_lock = threading.Lock()
        inner = f"inproc://send-{id(self)}"
        self._frames_in = self._context.socket(zmq.PAIR)
        self._frames_in.bind(inner)
        self._frames_out = self._context.socket(zmq.PAIR)
        self._frames_out.connect(inner)
        self._frames_out.setsockopt(zmq.LINGER, 0)
        self._frames_out.setsockopt(zmq.SNDTIMEO, _STUCK_MS)
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 200),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.HEARTBEAT_IVL, 5000),  # a host that vanished says no goodbye
            (zmq.HEARTBEAT_TIMEOUT, 15000),
            (zmq.IMMEDIATE, 1),  # nothing queues for a scheduler that is not there
        ):
            self._socket.setsockopt(option, value)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = self._socket.get_monitor_socket(events)
        self._socket.connect(self.endpoint)
        self._thread = threading.Thread(target=self._io, name="quire-worker-io", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Queue one frame. It is dropped when no scheduler is connected: whoever comes next
        gets a Hello first."""
        with self._send_lock:
            if not self._closed.is_set() and not self._broken:
                self._frames_out.send(frame)

    def recv(self, timeout_s: float) -> bytes | None:
        """The next frame; None after timeout_s, when the link is closed, and, early, when the
        connection came or went. Raises RuntimeError when the link broke for good."""
        try:
            item = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get(False)
        except queue.Empty:
            return None
        if item is None:
            if self._broken:
                raise RuntimeError(f"the link to {self.endpoint} broke; see above")
            return None
        self.received_ns, frame = item
        return frame

    def close(self) -> None:
        """Send what is queued (for at most 0.2 s) and stop the thread."""
        with self._send_lock:
            if self._closed.is_set():
                return
            self._closed.set()
            with suppress(zmq.Again):
                self._frames_out.send(b"")
        self._thread.join(timeout=2)
        self._frames_out.close()
        self._context.term()

    def _io(self) -> None:
        poller = zmq.Poller()
        for socket in (self._socket, self._frames_in, self._monitor):
            poller.register(socket, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll(int(INTERVAL_S * 1e3)))
                self._pulse.beat()
                if self._monitor in ready:
                    self._connection_event()
                if self._socket in ready:
                    self._receive()
                if self._frames_in in ready and not self._forward():
                    return
        except Exception:
            self._broken = True
            log.exception("the link to %s broke", self.endpoint)
        finally:
            self._inbox.put(None)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
            self._frames_in.close(0)

    def _receive(self) -> None:
        """Take all frames that are there."""
        try:
            while True:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
                self._inbox.put((time.monotonic_ns(), parts[-1]))
        except zmq.Again:
            pass

    def _forward(self) -> bool:
        """Send all frames that were queued; False at the end."""
        try:
            while True:
                frame = self._frames_in.recv(zmq.NOBLOCK)
                if not frame:
                    return False
                try:
                    self._socket.send(frame, zmq.NOBLOCK)
                except zmq.Again:
                    # The event of a connection may come a moment before it takes frames.
                    if self.connected and self._socket.poll(100, zmq.POLLOUT):
                        self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return True  # the queue is empty

    def _connection_event(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self.connected:
            self.generation += 1
        self._inbox.put(None)
