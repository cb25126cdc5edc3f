"""The fixture that looks for leftovers finds them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from flow.processes import clean_environ
from flow.traces_left import SHARED, Traces

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_an_orphan_is_found_by_its_mark() -> None:
    traces = Traces()
    # started by a child that ends at once, in a session of its own: nobody's descendant
    start = f"Popen({SLEEP!r}, start_new_session=True, stdout=DEVNULL)"
    starter = f"from subprocess import DEVNULL, Popen; print({start}.pid)"
    done = subprocess.run(
        [sys.executable, "-c", starter], env=clean_environ(), stdout=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    pid = int(done.stdout)
    assert any(f"process {pid}:" in line for line in traces.left(timeout_s=0))
    os.kill(pid, signal.SIGKILL)
    assert not traces.left(timeout_s=5)


def test_a_listening_socket_is_found() -> None:
    traces = Traces()
    with socket.create_server(("127.0.0.1", 0)):
        assert any(line.startswith("socket") for line in traces.left(timeout_s=0))
    assert not traces.left(timeout_s=0)


def test_shared_memory_that_nobody_maps_is_found() -> None:
    traces = Traces()
    file = SHARED / f"flow-test-{os.getpid()}"
    file.write_bytes(b"x")
    try:
        assert traces.left(timeout_s=0) == [str(file)]
    finally:
        file.unlink()
    assert not traces.left(timeout_s=0)
