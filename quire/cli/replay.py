"""`quire replay`: run a journal's plans on a worker in this process and compare every result.

Knows files, workers and words; what makes two results equal is in player.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from quire import log as quire_log
from quire.cli import player
from quire.cli.options import Line
from quire.config import Resolved, flag
from quire.errors import ConfigError
from quire.v1 import step_pb2 as pb

if TYPE_CHECKING:
    from quire_scheduler.segment import Header, Segment
    from quire_worker.worker import Worker

TELL_S = 5.0  # between two lines of progress
MAX_SLOTS = 16384  # what --max-num-seqs can ask for; a worker has some to spare


def run(line: Line, resolved: Resolved) -> int:
    """0: all equal; 1: a step differs or the file is damaged, named. Raises ConfigError when the
    journal can't be replayed here."""
    quiet = resolved.is_default("log_level")
    quire_log.setup(
        "replay", "error" if quiet else resolved.config.log_level, resolved.config.log_format
    )
    found = open_segments(line.option("path"))
    from quire_scheduler.segment import DamagedSegment
    from quire_worker import backends

    try:
        readable = list(found)
    except DamagedSegment as damage:
        print(f"{damage}.")
        return 1
    for segment in readable:
        if segment.header.privacy != "full":
            raise ConfigError(
                f"{segment.path.name} was recorded with --journal-privacy "
                f"{segment.header.privacy}: its prompts are not in it, so it can't be replayed."
            )
    backends.prepare_threads(resolved.config.num_threads)
    replay = Replay(resolved)
    for segment in readable:
        try:
            wrong = replay.segment(segment)
        except DamagedSegment as damage:
            wrong = f"{damage}, after {replay.last}"
        except (DecodeError, ValueError) as error:  # whole, but nobody wrote that
            wrong = f"{segment.path.name} at byte {segment.byte}, after {replay.last}: {error}"
        if wrong:
            print(f"{wrong}.")
            print(f"{replay.total} before it: equal.")
            return 1
        if segment.torn:
            print(f"{segment.path.name} ends in a torn record, after {replay.last}.")
    total = replay.total
    if not total.steps:
        raise ConfigError(f"{line.option('path')} holds no step with its result.")
    for note in total.notes():
        print(note)
    print(f"{total}: all equal")
    return 0


def open_segments(path: str) -> Iterator[Segment]:
    """The segments of a folder or the one file. Raises ConfigError when there is none, and, when
    iterated, DamagedSegment."""
    from quire_scheduler.segment import Segment, segments

    if not path:
        raise ConfigError("which journal? Give its folder, or one of its files.")
    try:
        return map(Segment, segments(Path(path).expanduser()))
    except OSError as error:
        raise ConfigError(f"{error}.") from None


@dataclass
class Total:
    """What was compared so far."""

    steps: int = 0
    tokens: int = 0
    unanswered: int = 0  # plans whose result a fault or the journal's end lost
    faults: int = 0  # steps that failed then and did not now

    def __str__(self) -> str:
        return f"{self.steps:,} steps, {self.tokens:,} tokens"

    def notes(self) -> Iterator[str]:
        if self.unanswered:
            yield f"{self.unanswered:,} plans have no result: they were in flight when it ended."
        if self.faults:
            yield f"{self.faults:,} steps failed when they were recorded, and did not now."


class Replay:
    """One worker at a time, made anew where the journal's had another layout."""

    def __init__(self, resolved: Resolved) -> None:
        self.total = Total()
        self.last = "its beginning"  # the last record that was read, in words
        self._resolved = resolved
        self._worker: Worker | None = None
        self._layout: tuple[Any, ...] = ()
        self._player = player.Player(self._execute)
        self._told = time.monotonic()

    def segment(self, segment: Segment) -> str:
        """Replay one segment; where it differs, or ''. Raises DamagedSegment, and ConfigError for
        one that was recorded with another model."""
        from quire_scheduler.segment import Direction

        self.last = "its beginning"
        hello: pb.Hello | None = None
        requests: dict[int, str] = {}  # slot -> request id
        answers: dict[tuple[int, int], pb.StepResult] = {}  # ours, until the recorded one comes
        for record in segment:
            if record.direction is Direction.PLAN:
                plan = pb.SchedulerFrame.FromString(record.frame).plan
                if hello is None:
                    raise ConfigError(f"{segment.path.name} names no worker before its first plan.")
                self._prepare(segment.header, hello)
                requests.update({admit.slot: admit.request_id for admit in plan.admit})
                answers[plan.epoch, plan.seq] = self._player.play(plan)
                self.last = f"plan {plan.seq} of epoch {plan.epoch}"
                self._tell(segment)
                continue
            message = pb.WorkerFrame.FromString(record.frame)
            if message.HasField("hello"):
                if hello is None or hello.worker_epoch != message.hello.worker_epoch:
                    self._forget(answers)
                    self._player.new_worker(message.hello.block_size)
                hello = message.hello
                self.last = f"the Hello of rank {hello.rank}"
            elif message.HasField("result"):
                result = message.result
                self.last = f"the result of plan {result.seq} of epoch {result.epoch}"
                # None: it answers a plan of an earlier segment, or answers one again
                ours = answers.pop((result.epoch, result.seq), None)
                if ours is None or hello is None or result.worker_epoch != hello.worker_epoch:
                    continue
                differs = self._compare(result, ours, requests)
                if differs:
                    return f"{segment.path.name}, epoch {result.epoch}, seq {result.seq}: {differs}"
        self._forget(answers)
        return ""

    def _compare(self, recorded: pb.StepResult, ours: pb.StepResult, names: dict[int, str]) -> str:
        if player.failed(recorded) and not player.failed(ours):
            self.total.faults += 1
            return ""
        found = player.difference(recorded, ours)
        if found is None:
            self.total.steps += 1
            self.total.tokens += player.num_tokens(recorded)
            return ""
        told = f"{found.what}: recorded {found.expected}, replayed {found.got}"
        if found.slot < 0:
            return told
        return f"slot {found.slot} (request {names.get(found.slot, '')}), {told}"

    def _forget(self, answers: dict[tuple[int, int], pb.StepResult]) -> None:
        """Another worker process, or another run: its memory held nothing of this."""
        self.total.unanswered += len(answers)
        answers.clear()
        if self._worker is not None:
            self._worker.kv_cache.pool.zero_()

    def _execute(self, plan: pb.StepPlan) -> pb.StepResult:
        assert self._worker is not None
        return self._worker.execute(plan)

    def _prepare(self, header: Header, hello: pb.Hello) -> None:
        """A worker like the one that said hello."""
        from quire_scheduler.group import num_blocks

        blocks = num_blocks(hello)
        layout = (
            header.model, header.revision, hello.model_digest, hello.dtype, hello.kv_dtype,
            hello.block_size, blocks, hello.max_slots, hello.max_model_len,
        )  # fmt: skip
        if layout == self._layout:
            return
        if max(hello.tp_size, 1) * max(hello.pp_size, 1) > 1:
            raise ConfigError("the journal is of a group of several workers; replay runs one.")
        resolved = self._resolved
        recorded: dict[str, Any] = {
            "model": header.model, "revision": header.revision, "dtype": hello.dtype,
            "block_size": hello.block_size, "max_model_len": hello.max_model_len,
            "max_num_seqs": min(hello.max_slots, MAX_SLOTS), "num_gpu_blocks_override": blocks,
        }  # fmt: skip
        given = {name for name in recorded if not resolved.is_default(name)}
        config = dataclasses.replace(
            resolved.config,
            **{name: value for name, value in recorded.items() if name not in given},
            kv_cache_memory_bytes=0, host_cache_memory=0, journal="", otlp_traces_endpoint="",
        )  # fmt: skip
        from quire_worker.worker import Worker

        self._worker = None  # its memory first
        worker = Worker(config.check())
        _refuse_another(hello, worker.hello())
        self._worker, self._layout = worker, layout

    def _tell(self, segment: Segment) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_S:
            self._told = now
            share = 100 * segment.byte // max(segment.path.stat().st_size, 1)
            print(f"{segment.path.name}: {share} %, {self.total} so far", file=sys.stderr)


def _refuse_another(recorded: pb.Hello, ours: pb.Hello) -> None:
    """Raise ConfigError unless the worker can land on the same tokens."""
    from quire_scheduler.group import num_blocks

    for name, cure in (
        ("model_digest", "replay it with the very model, by --model FOLDER"),
        ("dtype", f"leave out {flag('dtype')}"),
        ("kv_dtype", f"leave out {flag('dtype')}"),
        ("block_size", f"leave out {flag('block_size')}"),
        ("vocab_size", "replay it with the very model, by --model FOLDER"),
    ):
        was, now = getattr(recorded, name), getattr(ours, name)
        if was != now:
            raise ConfigError(f"{name} of the journal is {was}, of this worker {now}: {cure}.")
    if num_blocks(recorded) > num_blocks(ours):
        raise ConfigError(
            f"the journal needs {num_blocks(recorded)} KV blocks, this worker has "
            f"{num_blocks(ours)}: leave out {flag('num_gpu_blocks_override')}."
        )
    if recorded.system_fingerprint != ours.system_fingerprint:
        print(
            f"recorded by {recorded.system_fingerprint} on {recorded.device}, replayed by "
            f"{ours.system_fingerprint} on {ours.device}: bits may differ for that alone.",
            file=sys.stderr,
        )
