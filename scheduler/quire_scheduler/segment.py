"""The journal's files: segments of checksummed records, each readable by itself.

Knows no frame's meaning and no policy. A segment is MAGIC, then records; the first one is the
header (JSON). A record is a head of 21 bytes and its frame; all integers little-endian.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

MAGIC = b"QUIREJ2\n"
VERSION = 2
PATTERN = re.compile(r"journal-\d{8}T\d{6}\.\d{6}Z-\d+\.qj")  # sorts by time
MAX_FRAME_BYTES = 256 << 20
_HEAD = struct.Struct("<BIQI")  # kind, length, ns on the engine's clock, CRC-32 of the frame
_CHECK = struct.Struct("<I")  # CRC-32 of the head, so that a wrong length is no torn record
HEAD_BYTES = _HEAD.size + _CHECK.size
Read = Callable[[int], bytes]  # the next n bytes, fewer at the file's end


class Direction(IntEnum):
    HEADER = 0
    PLAN = 1  # SchedulerFrame bytes, scheduler -> worker
    WORKER = 2  # WorkerFrame bytes, worker -> scheduler


class Record(NamedTuple):
    direction: Direction
    monotonic_ns: int
    frame: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says of itself; who the workers are is in the Hello frames that follow."""

    model: str  # as --model named it
    revision: str
    privacy: str  # full, hashed or none
    software: str
    run: str  # hex, one per scheduler process
    number: int  # of the segment in its run, from 0
    created_ns: int  # UTC, at monotonic_ns
    monotonic_ns: int
    version: int = VERSION


class DamagedSegment(ValueError):
    """Bytes that are not those that were written."""

    def __init__(self, path: Path, byte: int, what: str) -> None:
        super().__init__(f"{path.name} is damaged at byte {byte}: {what}")
        self.path, self.byte, self.what = path, byte, what


def encode(record: Record) -> bytes:
    direction, monotonic_ns, frame = record
    head = _HEAD.pack(direction, len(frame), monotonic_ns, zlib.crc32(frame))
    return b"".join((head, _CHECK.pack(zlib.crc32(head)), frame))


def beginning(header: Header) -> bytes:
    """The first bytes of a segment."""
    text = json.dumps(asdict(header)).encode()
    return MAGIC + encode(Record(Direction.HEADER, header.monotonic_ns, text))


class Segment:
    """One file, to be iterated: its records in order, without the header.

    A torn last record (a crash, a full disk) ends the iteration and sets `torn`; anything else
    that was not written so raises DamagedSegment. `byte` is where the last record began.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = False
        self.byte = 0
        self.header = self._header()

    def _header(self) -> Header:
        with self.path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DamagedSegment(self.path, 0, "no quire journal begins so")
            record = self._record(len(MAGIC), file.read(HEAD_BYTES), file.read)
        if record is None or record.direction is not Direction.HEADER:
            raise DamagedSegment(self.path, len(MAGIC), "there is no header")
        try:
            values = json.loads(record.frame)
            if values["version"] != VERSION:
                raise DamagedSegment(
                    self.path, len(MAGIC), f"version {values['version']} is not {VERSION}"
                )
            return Header(**{field.name: values[field.name] for field in fields(Header)})
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DamagedSegment):
                raise
            raise DamagedSegment(self.path, len(MAGIC), f"its header says {error!r}") from None

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            self.byte = len(MAGIC)
            file.seek(self.byte)
            while head := file.read(HEAD_BYTES):
                record = self._record(self.byte, head, file.read)
                if record is None:
                    self.torn = True
                    return
                if record.direction is not Direction.HEADER:
                    yield record
                self.byte += HEAD_BYTES + len(record.frame)

    def _record(self, at: int, head: bytes, read: Read) -> Record | None:
        """The record at byte `at`; None when the file ends inside it."""
        if len(head) < HEAD_BYTES:
            return None
        check = _CHECK.unpack_from(head, _HEAD.size)[0]
        kind, length, monotonic_ns, crc = _HEAD.unpack_from(head)
        if zlib.crc32(head[: _HEAD.size]) != check or kind not in tuple(Direction):
            raise DamagedSegment(self.path, at, "the head of a record is not as written")
        if length > MAX_FRAME_BYTES:
            raise DamagedSegment(self.path, at, f"a record of {length} bytes")
        frame = read(length)
        if len(frame) < length:
            return None
        if zlib.crc32(frame) != crc:
            name = Direction(kind).name.lower()
            raise DamagedSegment(self.path, at, f"the {name} frame there is not as written")
        return Record(Direction(kind), monotonic_ns, frame)


def segments(path: str | os.PathLike[str]) -> list[Path]:
    """The segments of a folder, oldest first, or the one file. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if PATTERN.fullmatch(p.name))
        found = [p for p in found if p.stat().st_size]
        if not found:
            raise FileNotFoundError(f"{path} holds no journal-*.qj")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a journal's folder nor one of its files")
    return [path]
