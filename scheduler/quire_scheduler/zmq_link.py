"""ZmqLink: the scheduler's end of the step wire, one ROUTER for all workers.

Knows bytes and peers, not what a frame says. Sends never wait: a peer that is gone or does not
read is reported at once (ROUTER_MANDATORY and a bound of our own), never dropped in silence.
"""

from __future__ import annotations

import math
import socket
import threading

import zmq
from zmq.utils.monitor import recv_monitor_message

from quire.errors import AddressInUse, ConfigError

MAX_FRAME_BYTES = 256 << 20
MAX_QUEUED = 64  # frames to one peer; two plans and heartbeats are normal
MAX_FRAMES_PER_POLL = 1024


class ZmqLink:
    """Implements quire.link.SchedulerLink. All but wake() belongs to the engine thread."""

    def __init__(self, address: str) -> None:
        """address: 'host:port' or a full ZeroMQ endpoint; port 0 = any (see `endpoint`).
        Raises AddressInUse or ConfigError."""
        endpoint = address if "://" in address else f"tcp://{address}"
        self.num_malformed = 0  # not of two parts
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.SNDHWM, MAX_QUEUED),
            (zmq.RCVHWM, MAX_FRAMES_PER_POLL),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.LINGER, 200),
            (zmq.HEARTBEAT_IVL, 5000),  # a host that vanished says no goodbye
            (zmq.HEARTBEAT_TIMEOUT, 15000),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            if error.errno == zmq.EADDRINUSE:
                raise AddressInUse(
                    f"{address} (--step-address) is taken, perhaps by another scheduler. Stop it "
                    "or choose another port."
                ) from None
            raise ConfigError(f"--step-address {address}: {error}.") from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._peers: set[bytes] = set()  # that have sent something
        # A socket pair instead of an inproc ZeroMQ socket: any thread may write to it.
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._lock = threading.Lock()
        self._closed = False
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake_in):
            self._poller.register(source, zmq.POLLIN)

    def send(self, peer: bytes, frame: bytes) -> bool:
        """False when the peer is gone or MAX_QUEUED frames wait for it."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError:
            self._peers.discard(peer)
            return False
        return True

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """All (peer, frame) that are there. When a connection went, each peer has an empty frame
        among them: the caller is to find out which of them can't be reached any more."""
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1e3)))
        if self._wake_in.fileno() in ready:
            self._drain_wake()
        frames: list[tuple[bytes, bytes]] = []
        if self._socket in ready:
            try:
                while len(frames) < MAX_FRAMES_PER_POLL:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK)
                    if len(parts) != 2 or not parts[1]:
                        self.num_malformed += 1
                        continue
                    self._peers.add(parts[0])
                    frames.append((parts[0], parts[1]))
            except zmq.Again:
                pass
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            frames += [(peer, b"") for peer in self._peers]
        return frames

    def wake(self) -> None:
        with self._lock:
            if not self._closed:
                try:
                    self._wake_out.send(b"w")
                except BlockingIOError:
                    pass  # it is full of wakes already

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake_out.close()
        self._wake_in.close()
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _drain_wake(self) -> None:
        try:
            while len(self._wake_in.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass
