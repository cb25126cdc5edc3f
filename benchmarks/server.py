"""A server of a benchmark's own: `quire serve` on free ports, what it tells, what it takes.

Linux only (/proc).
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A `quire serve` of one's own."""

    pid: int
    port: int
    command: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        """(status, body); (0, "") when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with closing(connection):
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except OSError:
                return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 when there are none."""
        found = 0.0
        for line in self.get("/metrics")[1].splitlines():
            ours = all(f'{key}="{value}"' in line for key, value in labels.items())
            if ours and re.match(rf"{name}[{{ ]", line):
                found += float(line.rpartition(" ")[2])
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far by service, and by this process as 'client'."""
        found = {name: _cpu_s(pid) for name, pid in services(self.pid).items()}
        return {**found, "client": time.process_time()}


def services(pid: int) -> dict[str, int]:
    """Pids of a supervisor's children, by the command that they run."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            cells = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_text().split("\0")
            if int(cells[1]) == pid:
                found[words[words.index("quire.cli") + 1]] = int(stat.parent.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def memory_mib(pids: dict[str, int]) -> dict[str, float]:
    """Resident memory of services."""
    found = {}
    for name, pid in pids.items():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            found[name] = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        except (OSError, IndexError):
            continue
    return found


def _cpu_s(pid: int) -> float:
    try:
        cells = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(cells[11]) + int(cells[12])) / _TICKS
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def serve(model: str, *flags: str) -> Iterator[Server]:
    """`quire serve MODEL flags...` on free ports, ready; stopped on the way out."""
    gateway, engine, step, scheduler, worker = free_ports(5)
    words = [
        *("serve", model, "--served-model-name", "m", "--port", str(gateway)),
        *("--engine-address", f"127.0.0.1:{engine}", "--step-address", f"127.0.0.1:{step}"),
        *("--scheduler-metrics-port", str(scheduler), "--worker-metrics-port", str(worker)),
        *flags,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quire.cli", *words], stdout=log, stderr=log, cwd=ROOT
        )
        server = Server(process.pid, gateway, f"quire serve {model} {' '.join(flags)}".strip())
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while server.get("/ready")[0] != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"no server:\n{log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
