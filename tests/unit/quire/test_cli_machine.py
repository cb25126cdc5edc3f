"""What is read from the kernel: ports, who holds them, memory."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from quire.cli import machine


def test_a_listener_takes_its_port_and_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert not machine.port_is_free("127.0.0.1", port)
        assert not machine.port_is_free("0.0.0.0", port)
        assert f"process {os.getpid()} (" in machine.holder_of(port)
    assert machine.port_is_free("127.0.0.1", port)
    assert machine.holder_of(port) == ""


def test_a_wildcard_listener_takes_every_address() -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        assert not machine.port_is_free("127.0.0.1", server.getsockname()[1])


def test_a_port_that_was_just_in_use_is_free_again() -> None:
    """A connection in TIME_WAIT must not keep a server from starting again."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))):
            accepted, _ = server.accept()
            accepted.close()
    assert machine.port_is_free("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(OSError):
        machine.port_is_free("192.0.2.1", 8000)


def test_free_ports_are_free() -> None:
    assert machine.port_is_free("127.0.0.1", machine.free_port())


def cgroup(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(text)
    return path


def test_memory_is_what_the_cgroup_leaves(tmp_path: Path, monkeypatch) -> None:
    whole = machine.free_memory()
    assert whole and whole > 1 << 20
    files = {"memory_max": "5000\n", "memory_current": "3000\n"}
    monkeypatch.setattr(machine, "CGROUP", cgroup(tmp_path, **files))
    assert machine.free_memory() == 2000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500\n")
    assert machine.free_memory() == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 1 << 20


def test_cores_are_what_the_quota_leaves(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.cores()
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores() == whole


def test_a_process_knows_its_age() -> None:
    assert 0 < machine.process_age() < 86400
