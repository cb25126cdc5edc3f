"""A whole server, started once for the tests that only use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from flow.processes import QUIRE, Process, addresses, clean_environ, get, post


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


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """`quire serve demo`; a module may set SERVE_FLAGS and SERVE_ENVIRON for its own."""
    flags = getattr(request.module, "SERVE_FLAGS", [])
    environ = {**addresses(), **getattr(request.module, "SERVE_ENVIRON", {})}
    with Process([*QUIRE, "serve", "demo", *flags], clean_environ(**environ)) as process:
        process.line("Ready in", timeout_s=90)
        yield Server(process, environ)
