"""The journal (F1): the very frames of the step wire, appended to a file.

Plans as sent, results and hellos as received; replaying them reproduces a run. Knows no frame's
meaning. A record is: direction (1 byte), length (u32), monotonic nanoseconds (u64), the frame; all
little-endian, after a header of 8 bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

from quire.errors import ConfigError

MAGIC = b"QUIREJ1\n"
_RECORD = struct.Struct("<BIQ")
FLUSH_S = 0.1
FLUSH_BYTES = 1 << 20
MAX_FRAME_BYTES = 256 << 20


class Direction(IntEnum):
    PLAN = 1  # SchedulerFrame bytes, scheduler -> worker
    WORKER = 2  # WorkerFrame bytes, worker -> scheduler


class Record(NamedTuple):
    direction: Direction
    monotonic_ns: int
    frame: bytes


class Journal:
    """Appends; what is written stays in memory until `flush()`, called when the loop is idle."""

    def __init__(self, path: str) -> None:
        self._buffer: list[bytes] = []
        self._size = 0
        self._flushed_ns = 0
        try:
            self._file: BinaryIO = open(path, "ab", buffering=0)
            if self._file.tell() == 0:
                self._file.write(MAGIC)
        except OSError as error:
            raise ConfigError(f"--journal {path}: {error.strerror}.") from None

    def append(self, direction: Direction, frame: bytes, monotonic_ns: int) -> None:
        self._buffer.append(_RECORD.pack(direction, len(frame), monotonic_ns))
        self._buffer.append(frame)
        self._size += _RECORD.size + len(frame)

    def flush_if_due(self, monotonic_ns: int, *, idle: bool) -> None:
        """One write for all that waits: when idle, every 100 ms, or beyond 1 MiB."""
        late = monotonic_ns - self._flushed_ns >= FLUSH_S * 1e9
        if self._buffer and (idle or late or self._size >= FLUSH_BYTES):
            self.flush()
            self._flushed_ns = monotonic_ns

    def flush(self) -> None:
        data = b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        while data:
            data = data[self._file.write(data) or 0 :]

    def close(self) -> None:
        self.flush()
        self._file.close()


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records in order. A torn last record (a crash) ends the iteration; anything else that
    is no journal raises ValueError."""
    with Path(path).open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no quire journal")
        while True:
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                return
            direction, length, monotonic_ns = _RECORD.unpack(head)
            if direction not in (1, 2) or length > MAX_FRAME_BYTES:
                raise ValueError(f"{path} is damaged at byte {file.tell() - _RECORD.size}")
            frame = file.read(length)
            if len(frame) < length:
                return
            yield Record(Direction(direction), monotonic_ns, frame)
