"""Short forms of benchmarks/chaos.py: services die while clients stream, and nobody loses a token.

The script starts its own server, compares every answer with an undisturbed run and exits 0 only
when every promise was kept.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import openai
import pytest

from flow.conftest import Server
from flow.processes import children, until

Chaos = Callable[..., dict[str, Any]]
REQUEST = {
    "model": "demo",
    "prompt": "Once upon a time",
    "max_tokens": 400,
    "temperature": 1.0,
    "seed": 11,
    "extra_body": {"ignore_eos": True},
}


def pid_of(server: Server, service: str) -> int:
    for pid in children(server.process.pid):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if service.encode() in file.read().split(b"\0"):
                return pid
    raise AssertionError(f"no {service} among the children")


def test_a_stock_client_sees_a_pause_and_nothing_else(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        whole = client.completions.create(**REQUEST)
        text, reason, chunks = "", None, 0
        for chunk in client.completions.create(**REQUEST, stream=True):
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
            chunks += 1
            if chunks == 20:
                os.kill(pid_of(server, "worker"), signal.SIGKILL)
    assert (text, reason) == (whole.choices[0].text, "length")


def test_a_killed_gateway_comes_back_and_what_it_had_asked_for_is_cancelled(server: Server) -> None:
    """Its clients are cut off: nobody else holds their sockets. The engine must not work on."""
    body = {**REQUEST, **REQUEST["extra_body"], "max_tokens": 1800, "stream": True}
    del body["extra_body"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    assert connection.getresponse().readline()
    os.kill(pid_of(server, "gateway"), signal.SIGKILL)
    connection.close()
    until(lambda: server.get("/ready")[0] == 200, 60, "the gateway is back")
    until(lambda: held(server) == {"running": 0, "waiting": 0, "used": 0}, 2, "all is free")
    status, answer = server.post("/v1/completions", {**body, "max_tokens": 4, "stream": False})
    assert status == 200 and answer["usage"]["completion_tokens"] == 4


def held(server: Server) -> dict[str, float]:
    """Requests and blocks that the scheduler has at hand."""
    pattern = r"^quire_(?:requests|kv_blocks)_(running|waiting|used)(?:\{[^}]*\})? (\S+)$"
    return {name: float(n) for name, n in re.findall(pattern, server.get("/metrics")[1], re.M)}


@pytest.mark.parametrize("service", ["worker", "scheduler", "both"])
def test_kills_lose_no_request_and_change_no_text(chaos: Chaos, service: str) -> None:
    found = chaos(service, "--kills", "2", "--requests", "3")
    assert found["kills"] == 2 and found["requests"] >= 24
    assert found["restarts"] >= 2


def test_the_request_that_crashes_the_worker_fails_alone(chaos: Chaos) -> None:
    found = chaos("poison", "--tokens", "250")
    assert 2 <= found["kill"]["restarts"] <= 5
    assert found["fail"]["restarts"] == 0


def test_a_killed_worker_does_not_disturb_the_drain(chaos: Chaos) -> None:
    found = chaos("drain", "--services", "worker", "--tokens", "400")
    assert found["kill worker"]["status"] == 0 and found["kill worker"]["newcomer_refused"]
