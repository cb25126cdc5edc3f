"""A whole server, started once for the tests that only use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flow.processes import QUIRE, ROOT, Process, addresses, clean_environ, get, post
from flow.traces_left import Traces


@dataclass
class Server:
    """A running `quire serve` and where its services listen."""

    process: Process
    environ: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.environ["QUIRE_PORT"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_address(self) -> str:
        return self.environ["QUIRE_ENGINE_ADDRESS"]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = post(self.port, path, json.dumps(body).encode())
        return status, json.loads(answer)

    def get(self, path: str) -> tuple[int, str]:
        status, answer = get(self.port, path)
        return status, answer.decode()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test: no process of its own, no listening socket, no shared memory."""
    traces = Traces()
    yield
    left = traces.left(timeout_s=5)
    assert not left, f"left behind: {left}"


@pytest.fixture
def chaos(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs benchmarks/chaos.py; its report, once every promise was kept. Times have slack: what
    they are on a quiet machine is the benchmark's to say."""

    def run(*words: str, slack: float = 10, timeout_s: float = 180) -> dict[str, Any]:
        file = tmp_path / "report.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *words]
        with Process(
            [*command, "--slack", str(slack), "--json", str(file)], clean_environ()
        ) as process:
            status = process.wait(timeout_s)
        assert status == 0, process.output
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    return run


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """`quire serve demo`; a module may set SERVE_FLAGS and SERVE_ENVIRON for its own."""
    flags = getattr(request.module, "SERVE_FLAGS", [])
    environ = {**addresses(), **getattr(request.module, "SERVE_ENVIRON", {})}
    with Process([*QUIRE, "serve", "demo", *flags], clean_environ(**environ)) as process:
        process.line("Ready in", timeout_s=90)
        yield Server(process, environ)
