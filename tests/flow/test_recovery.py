"""Kill a service while a client streams: the stream pauses, goes on and ends complete."""

from __future__ import annotations

import os
import signal

import openai
import pytest

from flow.conftest import Server
from flow.processes import children

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


@pytest.mark.parametrize("service", ["worker", "scheduler"])
def test_a_killed_service_loses_no_stream(server: Server, service: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        whole = client.completions.create(**REQUEST)
        text, reason, chunks = "", None, 0
        for chunk in client.completions.create(**REQUEST, stream=True):
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
            chunks += 1
            if chunks == 20:
                os.kill(pid_of(server, service), signal.SIGKILL)
    assert (text, reason) == (whole.choices[0].text, "length")
