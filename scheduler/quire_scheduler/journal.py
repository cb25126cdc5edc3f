"""The journal (F1): the very frames of the step wire, appended to a folder of bounded size.

Plans as sent, results and hellos as received; replaying them reproduces a run. Knows when a
segment is full, not how the next one begins: the driver sees to it that it opens with all that
lives. Nothing here raises once it runs: what can't be written switches the journal off.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.v1 import step_pb2
from quire.version import __version__
from quire_scheduler.counters import Counters
from quire_scheduler.redact import Redactor
from quire_scheduler.segment import (
    HEAD_BYTES,
    PATTERN,
    Direction,
    Header,
    Record,
    beginning,
    encode,
)

log = logging.getLogger("quire.scheduler")

FLUSH_S = 0.1
FLUSH_BYTES = 1 << 20
SEGMENTS = 8  # the folder holds about as many
MAX_SEGMENT_BYTES = 256 << 20


class Journal:
    """Appends; what is written stays in memory until `flush()`, called when the loop is idle.

    Several schedulers may share a folder: each writes files of its own, holds a lock on the one
    it writes, and deletes the oldest that nobody holds. Used by the engine thread only.
    """

    def __init__(
        self,
        config: EngineConfig,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: the engine's, seconds. Raises ConfigError for a folder that can't be written."""
        self._config, self._counters, self._clock = config, counters, clock
        self._utc_ns = time.time_ns() - int(clock() * 1e9)  # at the clock's zero
        self._folder = Path(config.journal).expanduser()
        self._max_bytes = config.journal_max_bytes
        self._run = secrets.token_hex(8)
        self._number = 0
        self._records: list[Record] = []
        self._pending = 0  # bytes in _records
        self._size = 0  # of the segment's file
        self._limit = 0  # bytes at which the segment is full
        self._flushed_ns = 0
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._open()
        except OSError as error:
            raise ConfigError(f"--journal {config.journal}: {error.strerror or error}.") from None

    # -- the loop's side: nothing here touches a file -----------------------------------------
    @property
    def full(self) -> bool:
        """The next segment should begin, as soon as nothing is in flight."""
        return not self._counters.journal_failed and self._size + self._pending >= self._limit

    def append(self, direction: Direction, frame: bytes, now: float) -> None:
        """now: the engine's clock."""
        if not self._counters.journal_failed:
            self._records.append(Record(direction, int(now * 1e9), frame))
            self._pending += HEAD_BYTES + len(frame)

    def flush_if_due(self, monotonic_ns: int, *, idle: bool) -> None:
        """One write for all that waits: when idle, every 100 ms, or beyond 1 MiB."""
        late = monotonic_ns - self._flushed_ns >= FLUSH_S * 1e9
        if self._records and (idle or late or self._pending >= FLUSH_BYTES):
            self.flush()
            self._flushed_ns = monotonic_ns

    # -- segments -----------------------------------------------------------------------------
    def rotate(self, hellos: Iterable[step_pb2.Hello]) -> None:
        """Begin the next segment with who is there. What they held is told by their first Hello
        alone: it is out of date."""
        self.flush()
        if self._counters.journal_failed:
            return
        try:
            self._file.close()
            self._open()
        except OSError as error:
            self._fail(error)
        for hello in hellos:
            frame = step_pb2.WorkerFrame(hello=hello)
            for name in (
                "held_block_ids", "held_block_names", "held_host_block_ids",
                "held_host_block_names",
            ):  # fmt: skip
                frame.hello.ClearField(name)
            self.append(Direction.WORKER, frame.SerializeToString(), self._clock())

    def opened(self) -> None:
        """All that lives is admitted. A segment holds at least as much again of what follows, or
        a small journal would be nothing but admissions."""
        self._limit = max(self._limit, 2 * (self._size + self._pending))

    def flush(self) -> None:
        """Write what waits."""
        records, self._records, self._pending = self._records, [], 0
        if self._counters.journal_failed or not records:
            return
        redact = self._redact
        data = b"".join(encode(r._replace(frame=redact(r.direction, r.frame))) for r in records)
        try:
            self._write(data)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        self.flush()
        self._file.close()

    # -- files --------------------------------------------------------------------------------
    def _open(self) -> None:
        """A new file, locked. Raises OSError."""
        monotonic_ns = int(self._clock() * 1e9)
        created_ns = self._utc_ns + monotonic_ns
        self._path, self._file = _create(self._folder, created_ns // 1000)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._redact = Redactor(self._config.journal_privacy)
        self._size = 0
        self._limit = min(self._max_bytes // SEGMENTS, MAX_SEGMENT_BYTES)
        header = Header(
            model=self._config.model,
            revision=self._config.revision,
            privacy=self._config.journal_privacy,
            software=__version__,
            run=self._run,
            number=self._number,
            created_ns=created_ns,
            monotonic_ns=monotonic_ns,
        )
        self._number += 1
        self._counters.journal_segments += 1
        self._write(beginning(header))

    def _write(self, data: bytes) -> None:
        self._make_room(len(data))
        self._size += len(data)
        self._counters.journal_bytes += len(data)
        while data:
            data = data[self._file.write(data) or 0 :]

    def _make_room(self, num_bytes: int) -> None:
        """Delete the oldest segments until `num_bytes` more are within the bound."""
        others = {
            Path(entry.path): entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(self._folder)
            if PATTERN.fullmatch(entry.name) and entry.name != self._path.name
        }
        excess = sum(others.values()) + self._size + num_bytes - self._max_bytes
        for path in sorted(others):
            if excess <= 0:
                return
            if _delete(path):
                excess -= others[path]
        if excess > 0:
            raise OSError(
                errno.EFBIG,
                f"what lives now does not fit --journal-max-bytes {self._max_bytes}; raise it",
            )

    def _fail(self, error: OSError) -> None:
        """Off for good: requests matter more than their record."""
        self._counters.journal_failed = True
        self._records.clear()
        self._pending = 0
        log.error(
            "the journal in %s is off, requests go on: %s", self._folder, error.strerror or error
        )


def _create(folder: Path, micros: int) -> tuple[Path, BinaryIO]:
    """A file that was not there, named by the time. Raises OSError."""
    while True:
        stamp = datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        path = folder / f"journal-{stamp}-{os.getpid()}.qj"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            return path, os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)
        except FileExistsError:
            micros += 1


def _delete(path: Path) -> bool:
    """Whether it is gone. One that its scheduler still writes stays."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
