"""What this machine has, read from the kernel: memory, cores, ports and who holds them.

Imports no tensor library: it says what can be known before anything is loaded.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import time
from contextlib import closing
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that can be had now: the machine's, or less where a cgroup says so. None: unknown."""
    found = []
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        found += [int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")]
    except OSError:
        pass
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        found.append(max(limit - used + _reclaimable(), 0))
    return min(found, default=None)


def _reclaimable() -> int:
    """Page cache that the kernel gives back before it kills anybody."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # 'max' = no limit
        return None


def cores() -> int:
    """Cores this process may use: by affinity, or less by the cgroup's quota. At least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(count, 1)


def has_gpu() -> bool:
    """Whether an NVIDIA device is visible to the kernel."""
    return Path("/dev/nvidia0").exists() or any(Path("/proc/driver/nvidia/gpus").glob("*"))


def port_is_free(host: str, port: int) -> bool:
    """Whether host:port can be listened on now. Raises OSError for a host that is not ours."""
    missing: OSError | None = None
    possible = False
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            with closing(socket.socket(family, kind, protocol)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)  # two may bind with SO_REUSEADDR; only one listens
                possible = True
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            missing = error  # a name may stand for an address family this machine lacks
    if not possible and missing is not None:
        raise missing
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def holder_of(port: int) -> str:
    """'process 123 (python3)' for the listener on a TCP port; '' when it can't be read."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            cells = row.split()
            if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{cells[9]}]")
    if not inodes:
        return ""
    for process in PROC.glob("[0-9]*"):
        try:
            for handle in (process / "fd").iterdir():
                if os.readlink(handle) in inodes:
                    name = (process / "comm").read_text().strip()
                    return f"process {process.name} ({name})"
        except OSError:  # not ours to look at, or gone
            continue
    return ""


def process_age() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    try:
        ticks = int((PROC / "self" / "stat").read_text().rpartition(")")[2].split()[19])
        now = float((PROC / "uptime").read_text().split()[0])
        return max(now - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return time.process_time()
