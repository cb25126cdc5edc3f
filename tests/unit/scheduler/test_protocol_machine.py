"""The step protocol under any order of faults: frames lost, repeated and late, either side
restarted at any point. Every stream equals the oracle, and the books balance all the way.

A state machine plays the wire, the clock, the gateway (which resubmits to a new scheduler) and the
supervisor (which starts a new worker); engine and worker are the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes.worker import FakeWorker, Options, oracle
from quire.config import EngineConfig
from quire.sampling import SamplingParams
from quire_scheduler.engine import Engine, Submission
from quire_scheduler.outputs import Outputs

MAX_LIVE = 8
HEAL_TURNS = 4000
OPTIONS = {
    "num_blocks": 40,
    "block_size": 4,
    "max_slots": 6,
    "max_model_len": 64,
    "num_host_blocks": 0,
}


class Wire:
    """Frames on their way, both directions; one worker is connected at a time."""

    def __init__(self) -> None:
        self.down: list[bytes] = []  # to the worker
        self.up: list[tuple[bytes, bytes]] = []  # from it, with its peer name
        self.arrived: list[tuple[bytes, bytes]] = []  # what the next poll gives
        self.number = 0
        self.num_malformed = 0

    @property
    def peer(self) -> bytes:
        return b"peer-%d" % self.number

    def send(self, peer: bytes, frame: bytes) -> bool:
        if peer != self.peer:
            return False  # that connection is gone
        self.down.append(frame)
        return True

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        frames, self.arrived = self.arrived, []
        return frames

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class WorkerEnd:
    """The connected worker's end."""

    wire: Wire
    peer: bytes

    def send(self, frame: bytes) -> None:
        self.wire.up.append((self.peer, frame))

    def recv(self, timeout_s: float) -> bytes | None:
        return None  # the machine hands frames over itself

    def close(self) -> None:
        pass


@dataclass
class Wanted:
    """A request as its gateway holds it."""

    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    attempt: int = 0
    deaths: int = 0
    done: str = ""  # finish reason, or 'cancelled'


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.wire = Wire()
        self.wanted: dict[int, Wanted] = {}
        self.engine = self._engine()
        self.worker = self._worker()

    # -- parts ------------------------------------------------------------------------------
    def _engine(self) -> Engine:
        config = EngineConfig(block_size=4, max_num_seqs=5, max_num_batched_tokens=24)
        return Engine(config, self.wire, clock=lambda: self.now)

    def _worker(self) -> FakeWorker:
        self.wire.number += 1
        worker = FakeWorker(WorkerEnd(self.wire, self.wire.peer), Options(**OPTIONS))
        worker.hello()
        return worker

    def deliver(self, outputs: Outputs) -> None:
        """What the engine has for the gateway: in order, once, for the attempt of now."""
        at = 0
        failures = {f.handle: f.error.name for f in outputs.failures}
        for row, handle in enumerate(outputs.handles.tolist()):
            one = self.wanted[handle]
            count = int(outputs.num_tokens[row])
            tokens = outputs.token_ids[at : at + count].tolist()
            at += count
            assert int(outputs.attempts[row]) == one.attempt, "a row of an older attempt"
            assert not one.done, "a row after the finish"
            if count:
                assert int(outputs.first_indices[row]) == len(one.tokens), "a gap or a repeat"
            one.tokens += tokens
            one.deaths = int(outputs.deaths[row])
            reason = int(outputs.finish_reasons[row])
            if reason:
                one.done = failures.get(handle) or {1: "stop", 2: "length"}[reason]

    def _submit(self, handle: int) -> None:
        one = self.wanted[handle]
        self.engine.submit(
            self,
            Submission(
                handle=handle,
                prompt_token_ids=np.array(one.prompt, np.int32),
                params=SamplingParams(max_tokens=one.max_tokens, seed=handle),
                output_token_ids=np.array(one.tokens, np.int32),
                attempt=one.attempt,
                deaths=one.deaths,
                request_id=f"r{handle}",
            ),
        )

    @property
    def live(self) -> list[int]:
        return [h for h, one in self.wanted.items() if not one.done]

    # -- what goes on -----------------------------------------------------------------------
    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(family=st.integers(0, 2), length=st.integers(1, 30), max_tokens=st.integers(1, 20))
    def a_request_comes(self, family: int, length: int, max_tokens: int) -> None:
        prompt = [(family * 131 + i * 7) % 900 + 3 for i in range(length)]
        handle = len(self.wanted)
        self.wanted[handle] = Wanted(prompt, max_tokens)
        self._submit(handle)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def a_client_goes(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.live))
        one = self.wanted[handle]
        self.engine.cancel(self, handle, one.attempt)
        one.done = "cancelled"
        self.engine.turn(0)  # from here on nothing of it is delivered

    @rule(down=st.integers(0, 4), up=st.integers(0, 2))
    def frames_flow(self, down: int, up: int) -> None:
        """So many frames arrive on either side; the engine turns once."""
        self.now += 0.003
        for _ in range(min(down, len(self.wire.down))):
            self.worker.on_frame(self.wire.down.pop(0))
        self.wire.arrived += self.wire.up[:up]
        del self.wire.up[:up]
        self.engine.turn(0)

    @rule(turns=st.integers(1, 12))
    def all_is_well_for_a_while(self, turns: int) -> None:
        for _ in range(turns):
            self.frames_flow(100, 100)

    @rule(seconds=st.floats(0.01, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.engine.turn(0)

    # -- faults -----------------------------------------------------------------------------
    @precondition(lambda self: self.live)
    @rule(
        answers=st.booleans(),
        fault=st.sampled_from(["lost", "repeated", "late", "garbled"]),
        which=st.integers(0, 3),
        later=st.integers(1, 3),
        flows=st.booleans(),
    )
    def a_frame_goes_wrong(
        self, answers: bool, fault: str, which: int, later: int, flows: bool
    ) -> None:
        """A plan or an answer; what is behind it may arrive at once."""
        self.frames_flow(0, 100)
        if answers:
            while self.wire.down:
                self.worker.on_frame(self.wire.down.pop(0))
        frames: list[Any] = self.wire.up if answers else self.wire.down
        if not frames:
            return
        i = which % len(frames)
        if fault == "lost":
            del frames[i]
        elif fault == "repeated":
            frames.insert(i + later, frames[i])
        elif fault == "late":
            frames.insert(i + later, frames.pop(i))
        elif answers:  # the engine is to shrug at bytes that are no frame
            peer, frame = frames[i]
            frames.insert(i, (peer, b"\xff" + frame[: len(frame) // 2]))
        if flows:
            self.frames_flow(100, 100)

    @rule(blip=st.booleans())
    def the_worker_says_hello_again(self, blip: bool) -> None:
        """It heard nothing for a while; with a blip on a new connection, and what was on the old
        one's way to it is gone."""
        if blip:
            self.wire.number += 1
            self.worker.link = WorkerEnd(self.wire, self.wire.peer)
            self.wire.down.clear()
        self.worker.hello()

    @rule()
    def the_worker_dies(self) -> None:
        """kill -9: frames to it are gone, frames from it may still arrive, its memory is lost."""
        assert self.worker.violations == []
        self.worker.die()
        self.wire.down.clear()
        self.worker = self._worker()

    @rule(read=st.integers(0, 5))
    def the_scheduler_dies(self, read: int) -> None:
        """The worker reads what had reached it, then says Hello to a new one, which knows nothing.
        Gateways resubmit what they hold."""
        for frame in self.wire.down[:read]:
            self.worker.on_frame(frame)
        self.wire.down.clear()
        self.wire.up.clear()
        self.wire.arrived.clear()
        self.engine = self._engine()
        for handle in self.live:
            self.wanted[handle].attempt += 1
            self._submit(handle)
        self.worker.hello()

    # -- what holds ---------------------------------------------------------------------------
    @invariant()
    def books_balance(self) -> None:
        self.engine.check()
        assert self.worker.violations == []

    def teardown(self) -> None:
        """No more faults: all that is live ends, and every token is the oracle's."""
        idle = 0
        for _ in range(HEAL_TURNS):
            if not self.live:
                break
            before = sum(len(one.tokens) for one in self.wanted.values()), len(self.live)
            self.frames_flow(1000, 1000)
            after = sum(len(one.tokens) for one in self.wanted.values()), len(self.live)
            idle = idle + 1 if before == after else 0
            if idle > 20:  # a plan or a result was lost: time brings the deadline, then a Hello
                idle = 0
                self.now += 40.0
                self.engine.turn(0)
                if not self.engine.stats().ready:
                    self.worker.hello()
        assert not self.live, f"{self.live} never ended: {self.engine.stats()}"
        for _ in range(8):
            self.frames_flow(1000, 1000)
        self.books_balance()
        stats = self.engine.stats()
        assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
        for handle, one in self.wanted.items():
            expected, reason = oracle(
                one.prompt, seed=handle, max_tokens=one.max_tokens, max_model_len=64
            )
            if one.done in ("cancelled", "request_crashed_worker"):
                assert one.tokens == expected[: len(one.tokens)]
                assert one.done == "cancelled" or one.deaths >= 2
            else:
                assert (one.tokens, one.done) == (expected, reason)


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
