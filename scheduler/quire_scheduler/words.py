"""Words: what a scheduler says to a worker besides plans.

Knows peers and the step protocol's small frames; no group, no requests and no time.
"""

from __future__ import annotations

from quire.link import SchedulerLink
from quire.v1 import step_pb2
from quire.wire import PROTOCOL_VERSION


class Words:
    """False from any of them: the peer can't be reached, or does not read."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link

    def welcome(self, peer: bytes, epoch: int) -> bool:
        welcome = step_pb2.Welcome(epoch=epoch, protocol_version=PROTOCOL_VERSION)
        return self._say(peer, step_pb2.SchedulerFrame(welcome=welcome))

    def refuse(self, peer: bytes, reason: str) -> bool:
        return self._say(peer, step_pb2.SchedulerFrame(refusal=step_pb2.Refusal(reason=reason)))

    def beat(self, peer: bytes, epoch: int, last_seq: int) -> bool:
        """That this scheduler lives, and in which epoch."""
        beat = step_pb2.Heartbeat(epoch=epoch, last_seq=last_seq)
        return self._say(peer, step_pb2.SchedulerFrame(heartbeat=beat))

    def ask_who(self, peer: bytes) -> bool:
        """A heartbeat of no epoch: the worker is not known, and is to say Hello."""
        return self.beat(peer, 0, 0)

    def _say(self, peer: bytes, message: step_pb2.SchedulerFrame) -> bool:
        return self._link.send(peer, message.SerializeToString())
