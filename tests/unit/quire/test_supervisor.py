"""Starting, watching and ending processes: with fakes in the place of the services."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flow.processes import Process, alive, until
from quire.cli import supervisor
from quire.config import EngineConfig

SCRIPT = str(Path(__file__).with_name("supervised.py"))
NAMES = ("gateway", "scheduler", "worker")


def supervise(tmp_path: Path, *specs: str) -> Process:
    return Process([sys.executable, "-P", SCRIPT, "supervise", str(tmp_path / "events"), *specs])


def events(tmp_path: Path) -> list[str]:
    path = tmp_path / "events"
    return path.read_text().splitlines() if path.exists() else []


def pids(tmp_path: Path) -> dict[str, int]:
    """The newest pid of each service."""
    starts = [e.split() for e in events(tmp_path) if " start " in e]
    return {name: int(pid) for name, _, pid in starts}


def test_sigterm_ends_services_one_after_the_other(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=drain=0.2", "scheduler", "worker") as process:
        process.line("ready")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    after = events(tmp_path)
    assert after[after.index("ready") + 1 :] == [
        f"{n} {what}" for n in NAMES for what in ("term", "end")
    ]


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=drain=30", "scheduler", "worker") as process:
        process.line("ready")
        family = pids(tmp_path)
        process.signal(signal.SIGINT)
        until(lambda: "gateway term" in events(tmp_path))
        begin = time.monotonic()
        process.signal(signal.SIGINT)
        process.wait()
        assert time.monotonic() - begin < 5
        assert not any(alive(pid) for pid in family.values())
    assert "gateway end" not in events(tmp_path)


def test_a_deaf_service_is_killed_after_its_grace(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway", "scheduler=deaf", "worker") as process:
        process.line("ready")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "scheduler did not end" in process.output
    assert "worker end" in events(tmp_path)


def test_a_failed_start_ends_all_with_its_status(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway", "scheduler", "worker=exit=2") as process:
        assert process.wait() == 2
        family = pids(tmp_path)
        assert "Model error: worker can't" in process.output
        assert "Traceback" not in process.output
        assert not any(alive(pid) for pid in family.values())


def test_a_killed_start_is_told(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=silent", "scheduler", "worker") as process:
        until(lambda: set(pids(tmp_path)) == set(NAMES))
        os.kill(pids(tmp_path)["worker"], signal.SIGKILL)
        assert process.wait() == 1
        assert "worker was killed by SIGKILL while it started" in process.output


def test_a_signal_while_starting_ends_cleanly(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=silent", "scheduler", "worker") as process:
        until(lambda: set(pids(tmp_path)) == set(NAMES))
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_dead_service_is_started_again(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway", "scheduler", "worker=once=1") as process:
        process.line("ready")
        first = pids(tmp_path)["worker"]
        process.line("worker ended with status 1; starting it again in 0.1 s")
        until(lambda: pids(tmp_path)["worker"] != first)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_service_that_stands_still_is_killed_and_started_again(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=beats", "scheduler=beats", "worker=beats,hang") as process:
        process.line("ready")
        first = pids(tmp_path)
        process.line("worker has stood still for")
        process.line("worker was killed by SIGKILL; starting it again in 0.1 s")
        until(lambda: pids(tmp_path)["worker"] != first["worker"])
        assert process.output.count("stood still") == 1
        assert {n: pids(tmp_path)[n] for n in NAMES[:2]} == {n: first[n] for n in NAMES[:2]}


def test_a_stopped_process_is_killed_too(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=beats", "scheduler=beats", "worker=beats") as process:
        process.line("ready")
        first = pids(tmp_path)["scheduler"]
        os.kill(first, signal.SIGSTOP)
        until(lambda: pids(tmp_path)["scheduler"] != first, 10)
        assert "scheduler has stood still" in process.output


def test_a_service_without_a_pulse_is_loading_for_as_long_as_it_takes(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=beats", "scheduler=beats", "worker") as process:
        process.line("ready")
        time.sleep(2.0)  # longer than a standstill may last
        assert "stood still" not in process.output


def test_nobody_is_blamed_when_the_supervisor_itself_stood_still(tmp_path: Path) -> None:
    with supervise(tmp_path, *(f"{name}=beats" for name in NAMES)) as process:
        process.line("ready")
        family = [process.pid, *pids(tmp_path).values()]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)  # as a machine that sleeps
        time.sleep(2.0)
        for pid in family:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1.0)
        assert "stood still" not in process.output
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_while_the_gateway_drains_the_others_are_kept_running(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway=drain=0.9", "scheduler", "worker") as process:
        process.line("ready")
        first = pids(tmp_path)["worker"]
        process.signal(signal.SIGTERM)
        until(lambda: "gateway term" in events(tmp_path))
        os.kill(first, signal.SIGKILL)
        until(lambda: pids(tmp_path)["worker"] != first)
        assert "gateway end" not in events(tmp_path)
        assert process.wait() == 0
    assert events(tmp_path)[-1] == "worker end"


def test_a_service_that_served_a_while_starts_again_soon(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway", "scheduler", "worker=beats") as process:
        process.line("ready")
        for count in range(1, 4):
            pid = pids(tmp_path)["worker"]
            time.sleep(supervisor.STEADY_S + 0.3)
            os.kill(pid, signal.SIGKILL)
            until(lambda: process.output.count("again in 0.1 s") == count)  # noqa: B023
            until(lambda: pids(tmp_path)["worker"] != pid)  # noqa: B023


def test_services_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    with supervise(tmp_path, "gateway", "scheduler", "worker=deaf") as process:
        process.line("ready")
        family = pids(tmp_path)
        process.signal(signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in family.values()), 2)


def test_settings_travel_by_environment_and_never_by_flags() -> None:
    config = EngineConfig(api_key=("secret",), port=1234)
    inherited = {"PATH": "/bin", "QUIRE_PORT": "9", "LLM_ENGINE_PORT": "8", "QUIRE_CONFIG": "x"}
    environ = supervisor.environment(config, inherited)
    assert environ["QUIRE_PORT"] == "1234" and environ["QUIRE_API_KEY"] == "secret"
    assert "LLM_ENGINE_PORT" not in environ and "QUIRE_CONFIG" not in environ
    assert environ["PATH"] == "/bin"
    assert not any("secret" in word for s in supervisor.services(config) for word in s.command)


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, "ended with status 3"), (-9, "was killed by SIGKILL"), (-99, "was killed by signal 99")],
)
def test_an_exit_status_in_words(status: int, words: str) -> None:
    assert supervisor.ended(status) == words
