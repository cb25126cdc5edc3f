"""What a test left behind: processes, listening sockets, shared memory. Linux only (/proc)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flow.processes import MARK, OPEN, alive, descendants

SHARED = Path("/dev/shm")


class Traces:
    """Made before a test. Whoever else runs on the machine is left out of it: processes are ours
    by a mark in their environment, sockets by their owner, memory by nobody using it."""

    def __init__(self) -> None:
        self._sockets = listening()
        self._shared = segments()

    def left(self, timeout_s: float) -> list[str]:
        """In words, what is there now and was not before; waits until it is gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [
                *(f"process {pid}: {words}" for pid, words in processes().items()),
                *(f"socket {inode}" for inode in listening() - self._sockets),
                *(f"{SHARED / name}" for name in unused(segments() - self._shared)),
            ]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


def processes() -> dict[int, str]:
    """Pids and commands of processes that this test process started, of which no open Process
    takes care."""
    known = {os.getpid()}
    for process in OPEN:
        known |= {process.pid, *descendants(process.pid)}
    mark = f"{MARK}={os.getpid()}".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mine = mark in (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if mine and int(entry.name) not in known and alive(int(entry.name)):
            found[int(entry.name)] = words.strip()
    return found


def listening() -> set[str]:
    """Inodes of the listening sockets of this process."""
    owned = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            owned.add(os.readlink(handle))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            cells = row.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in owned:
                found.add(cells[9])
    return found


def segments() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.exists() else set()


def unused(names: set[str]) -> list[str]:
    """Those of these segments that no running process maps."""
    if not names:
        return []
    maps = []
    for entry in Path("/proc").glob("[0-9]*/maps"):
        try:
            maps.append(entry.read_text())
        except OSError:
            continue
    return [name for name in names if not any(f"{SHARED / name}" in text for text in maps)]
