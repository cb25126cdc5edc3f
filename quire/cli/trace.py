"""An arrival trace out of a journal: who came when, with how many tokens in and out.

Knows the journal's frames; the format is described in docs/journal.md. A request that was admitted
several times (preempted, moved to a new segment, sent again to a new scheduler) is one arrival.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.cli.timeline import Tenant, Tracker
from quire.v1 import step_pb2 as pb
from quire.wire import unpack_i32

if TYPE_CHECKING:
    from quire_scheduler.segment import Segment

SAME_S = 0.001  # admissions of one request agree on its arrival to this


@dataclass(eq=False, slots=True)
class Arrival:
    """One request of the trace."""

    request_id: str
    run: str  # of the scheduler that has it now
    at: float  # UTC seconds
    block_size: int
    prompt: bytes
    stays: list[Tenant] = field(default_factory=list)  # in slots, one after the other

    @property
    def num_prompt_tokens(self) -> int:
        """0 when nothing tells: tokens are dropped and the first one was never sampled."""
        return next((t.num_prompt_tokens for t in self.stays if t.num_prompt_tokens), 0)

    @property
    def num_output_tokens(self) -> int:
        """As far as the journal goes. A request for a vector counts as one token."""
        return 1 if self.stays[-1].pools else max(t.num_output_tokens for t in self.stays)

    def line(self, begin: float, *, with_tokens: bool) -> dict[str, Any]:
        """The trace's object; begin: UTC seconds of its time 0."""
        found: dict[str, Any] = {
            "arrival_s": round(self.at - begin, 6),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "request_id": self.request_id,
        }
        if with_tokens:
            found["prompt_token_ids"] = list(unpack_i32(self.prompt))
        if self.prompt:
            found["block_hashes"] = block_hashes(self.prompt, self.block_size)
        return found


def block_hashes(prompt: bytes, block_size: int) -> list[str]:
    """A hex hash per full block of an i32 column, each over all tokens up to its end: equal
    prefixes of two prompts have equal hashes."""
    step = 4 * block_size
    hashes = []
    last = b""
    for start in range(0, len(prompt) - step + 1, step):
        last = hashlib.blake2b(last + prompt[start : start + step], digest_size=8).digest()
        hashes.append(last.hex())
    return hashes


def arrivals(found: Iterable[Segment]) -> tuple[list[dict[str, Any]], int]:
    """The trace's objects by time, and how many requests are not among them, having yielded
    nothing before they were cancelled or the journal ended. Raises DamagedSegment."""
    from quire_scheduler.segment import Direction

    everyone: list[Arrival] = []
    latest: dict[str, Arrival] = {}
    private = False
    for segment in found:
        header = segment.header
        private |= header.privacy != "full"
        tracker = Tracker()
        block_size = 16
        for record in segment:
            if record.direction is Direction.PLAN:
                plan = pb.SchedulerFrame.FromString(record.frame).plan
                _, admitted, _ = tracker.plan(plan)
                now = (header.created_ns - header.monotonic_ns + record.monotonic_ns) * 1e-9
                for tenant, admit in zip(admitted, plan.admit, strict=True):
                    at = now - admit.waited_micros * 1e-6
                    name = tenant.request_id
                    known = latest.get(name)
                    if known is None or not _same(known, at, header.run):
                        known = Arrival(name, header.run, at, block_size, tenant.prompt)
                        latest[name] = known
                        everyone.append(known)
                    known.run = header.run
                    if known.stays and not tenant.prompt:  # dropped for privacy
                        tenant.num_output_tokens = known.num_output_tokens
                    known.stays.append(tenant)
                continue
            message = pb.WorkerFrame.FromString(record.frame)
            if message.HasField("result"):
                tracker.result(message.result)
            elif message.HasField("hello"):
                block_size = message.hello.block_size
    done = [a for a in everyone if a.num_prompt_tokens and a.num_output_tokens]
    done.sort(key=lambda arrival: arrival.at)
    begin = done[0].at if done else 0.0
    lines = [arrival.line(begin, with_tokens=not private) for arrival in done]
    return lines, len(everyone) - len(done)


def _same(known: Arrival, at: float, run: str) -> bool:
    """Whether an admission under a known id is of that very request."""
    if known.run == run:
        return abs(known.at - at) < SAME_S
    return not known.stays[-1].ended
