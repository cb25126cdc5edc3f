"""The gateway as a process: start-up errors, signals, draining, what it imports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from gateway_builders import until, write_model

from fakes.engine_server import FakeEngine, Reply

START = """
import json, sys
from quire.config import EngineConfig
from quire_gateway.main import run
settings = json.loads(sys.argv[1])
sys.exit(run(EngineConfig(**settings)))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def process(**settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A gateway in a process of its own; killed at the end if it is still there."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", START, json.dumps(settings),
        stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.communicate()


async def status(http: aiohttp.ClientSession, url: str) -> int:
    """The status of a GET; 0 when nobody listens."""
    try:
        async with http.get(url) as response:
            await response.read()
            return response.status
    except aiohttp.ClientError:
        return 0


async def until_status(http: aiohttp.ClientSession, url: str, wanted: int) -> None:
    async with asyncio.timeout(20):
        while await status(http, url) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_health_answers_before_the_engine_is_there(tmp_path: Path) -> None:
    port = free_port()
    folder = write_model(tmp_path)
    async with (
        process(model=str(folder), port=port, engine_address="127.0.0.1:1") as child,
        aiohttp.ClientSession() as http,
    ):
        await until_status(http, f"http://127.0.0.1:{port}/health", 503)
        assert await status(http, f"http://127.0.0.1:{port}/ping") == 200
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 5) == 0


async def test_sigterm_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    folder = write_model(tmp_path)
    body = {"prompt": "hi", "max_tokens": 300, "stream": True}
    async with (
        FakeEngine(Reply(b"x" * 100, delay=0.01)) as engine,
        process(model=str(folder), port=port, engine_address=engine.address) as child,
        aiohttp.ClientSession() as http,
    ):
        await until_status(http, url + "/ready", 200)
        async with http.post(url + "/v1/completions", json=body) as response:
            await response.content.readline()
            child.send_signal(signal.SIGTERM)
            await until_status(http, url + "/ready", 503)
            async with http.post(url + "/v1/completions", json=body) as refused:
                assert refused.status == 503 and "Retry-After" in refused.headers
                assert (await refused.json())["error"]["code"] == "draining"
            rest = (await response.read()).decode()
        assert rest.endswith("data: [DONE]\n\n") and rest.count('"text":"x"') >= 98
        assert await asyncio.wait_for(child.wait(), 5) == 0


@pytest.mark.parametrize("second_signal", [False, True])
async def test_drain_has_an_end(tmp_path: Path, second_signal: bool) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {"model": str(write_model(tmp_path)), "port": port}
    settings["drain_timeout"] = 60.0 if second_signal else 0.3
    async with (
        FakeEngine(Reply(b"x", hang=True)) as engine,
        process(**settings, engine_address=engine.address) as child,
        aiohttp.ClientSession() as http,
    ):
        await until_status(http, url + "/ready", 200)
        body = {"prompt": "hi", "stream": True}
        async with http.post(url + "/v1/completions", json=body) as response:
            await response.content.readline()
            child.send_signal(signal.SIGTERM)
            if second_signal:
                await until_status(http, url + "/ready", 503)
                child.send_signal(signal.SIGTERM)
            rest = (await response.read()).decode()
        assert '"code":"draining"' in rest and "[DONE]" not in rest
        assert await asyncio.wait_for(child.wait(), 5) == 0


async def test_port_in_use_is_one_line_and_98(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        async with process(model=str(write_model(tmp_path)), port=port) as child:
            _, stderr = await child.communicate()
    assert child.returncode == 98
    (line,) = stderr.decode().splitlines()
    assert line.startswith("Address already in use: ") and str(port) in line
    assert f"(pid {os.getpid()})" in line and "--port" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/nowhere"}, ("Model error: ", "/nowhere")),
        ({"chat_template": "/no/template"}, ("Model error: ", "/no/template")),
        ({"host": "not a host"}, ("Configuration error: ", "--host")),
    ],
)
async def test_start_up_error_is_one_line_and_2(
    tmp_path: Path, settings: dict[str, object], words: tuple[str, ...]
) -> None:
    folder = write_model(tmp_path)
    wanted = {"model": str(folder), "port": free_port(), "log_level": "error", **settings}
    async with process(**wanted) as child:
        _, stderr = await child.communicate()
    assert child.returncode == 2
    (line,) = stderr.decode().splitlines()
    assert line.startswith(words[0]) and words[1] in line


async def test_runs_without_what_only_others_need(tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "numpy", "transformers", "zmq", "safetensors"):
    sys.modules[name] = None
import quire_gateway.main, quire_gateway.app
from pathlib import Path
from quire_gateway import text
model = text.load(Path(sys.argv[1]))
print(model.tokenizer.encode(model.template.render([{"role": "user", "content": "hi"}])))
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", code, str(write_model(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    stdout, _ = await child.communicate()
    assert child.returncode == 0 and stdout.startswith(b"[257, ")


async def test_text_needs_no_protocol_library() -> None:
    code = """
import sys
for name in ("aiohttp", "grpc", "prometheus_client"):
    sys.modules[name] = None
import quire_gateway.text
"""
    child = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", code)
    assert await child.wait() == 0


async def test_until_gives_up() -> None:
    with pytest.raises(TimeoutError):
        await until(lambda: False, timeout=0.05)
