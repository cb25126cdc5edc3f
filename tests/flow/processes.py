"""Start real processes on free ports, wait for what they do, and always stop them.

Every process gets its own process group; leaving the `with` kills what is left of it and
fails the test when something had to be killed.
"""

from __future__ import annotations

import http.client
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "FLOW_TEST_OF"  # in the environment of every process we start: our pid
OPEN: list[Process] = []  # those inside their `with`
QUIRE = [sys.executable, "-P", "-m", "quire.cli"]


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


def clean_environ(**extra: str) -> dict[str, str]:
    """This process's environment without settings of ours, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "LLM_ENGINE_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", MARK: str(os.getpid()), **extra}


def addresses() -> dict[str, str]:
    """QUIRE_ variables for one set of services on free ports."""
    gateway, engine, step, scheduler, worker = free_ports(5)
    return {
        "QUIRE_PORT": str(gateway),
        "QUIRE_ENGINE_ADDRESS": f"127.0.0.1:{engine}",
        "QUIRE_STEP_ADDRESS": f"127.0.0.1:{step}",
        "QUIRE_SCHEDULER_METRICS_PORT": str(scheduler),
        "QUIRE_WORKER_METRICS_PORT": str(worker),
    }


@dataclass
class Process:
    """One child process: its lines as they come, its status, its children."""

    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=clean_environ)
    lines: list[str] = field(default_factory=list)  # stdout and stderr so far

    def __enter__(self) -> Process:
        self.popen = subprocess.Popen(
            list(self.command),
            env=dict(self.environ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        OPEN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        OPEN.remove(self)
        family = [self.popen.pid, *descendants(self.popen.pid)]
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(15)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self.popen.wait()
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._reader.join(5)
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def line(self, part: str, timeout_s: float = 60) -> str:
        """Wait for a line that holds `part`."""
        deadline = time.monotonic() + timeout_s
        for line in self.lines:
            if part in line:
                return line
        while True:
            try:
                line = self._new.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(
                    f"no line with {part!r} in {timeout_s} s:\n{self.output}"
                ) from None
            if line is None:
                raise AssertionError(f"ended without a line with {part!r}:\n{self.output}")
            if part in line:
                return line

    def wait(self, timeout_s: float = 30) -> int:
        """The exit status, all output read."""
        try:
            status = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None
        self._reader.join(5)
        return status

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)


def run(
    *words: str, environ: Mapping[str, str] | None = None, timeout_s: float = 60, **options: Any
):
    """`quire words...` to its end: a CompletedProcess with text."""
    return subprocess.run(
        [*QUIRE, *words],
        env=clean_environ() if environ is None else dict(environ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        **{"stdin": subprocess.DEVNULL, **options},
    )


def until(condition: Callable[[], Any], timeout_s: float = 30, what: str = "") -> Any:
    """What `condition` returns once it is true; AssertionError after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.02)


def get(port: int, path: str, timeout_s: float = 5) -> tuple[int, bytes]:
    """GET on 127.0.0.1; (0, b'') when nobody answers."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def post(
    port: int, path: str, body: bytes, timeout_s: float = 60, headers: Mapping[str, str] = {}
) -> tuple[int, bytes]:
    """POST of JSON on 127.0.0.1."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()


def children(pid: int) -> list[int]:
    """Pids of the direct children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            cells = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(cells[1]) == pid and cells[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Pids of the children, their children, and so on."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
