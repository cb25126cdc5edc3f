"""A server with few places: who returns as told is served, urgency decides, blocks have owners."""

from __future__ import annotations

import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc

from flow.conftest import Server
from flow.processes import clean_environ, run, until
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc

SERVE_FLAGS = [
    *("--max-num-seqs", "1", "--max-waiting", "3", "--scheduling-policy", "priority"),
    *("--kvcache-block-size", "256"),
]  # fmt: skip
BODY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


def ask(server: Server, **fields: Any) -> tuple[int, Any, dict[str, str]]:
    """POST a completion: (status, answer, headers in lower case)."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        body = json.dumps(BODY | fields)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(answer.read()), found


def gauge(server: Server, name: str) -> float:
    match = re.search(rf"^{name}{{[^}}]*}} (\S+)$", server.get("/metrics")[1], re.MULTILINE)
    assert match, name
    return float(match[1])


def test_clients_that_come_back_as_told_are_all_served(server: Server) -> None:
    refusals = []

    def client(number: int) -> str:
        while True:
            status, answer, headers = ask(server, max_tokens=40, seed=number)
            if status == 200:
                return str(answer["choices"][0]["text"])
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            wait_ms = int(headers["retry-after-ms"])
            assert wait_ms <= 1000 * int(headers["retry-after"]) <= 60_000
            refusals.append(wait_ms)
            time.sleep(wait_ms / 1000)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(client, range(12)))
    assert len(set(texts)) == 1
    assert 12 - 4 <= len(refusals) < 12 * 8
    assert gauge(server, "quire_requests_limit") == 4
    until(lambda: gauge(server, "quire_requests_running") == 0)


def test_a_flood_is_refused_quickly_and_leaves_nothing_behind(server: Server) -> None:
    def client(number: int) -> tuple[int, float, bool]:
        begin = time.monotonic()
        status, _, headers = ask(server, max_tokens=60, prompt=[5 + number] * 32)
        return status, time.monotonic() - begin, "retry-after-ms" in headers

    with ThreadPoolExecutor(40) as pool:
        seen = list(pool.map(client, range(80)))
    assert {status for status, _, _ in seen} == {200, 429}
    assert all(told for status, _, told in seen if status == 429)
    served = sorted(took for status, took, _ in seen if status == 200)
    refused = sorted(took for status, took, _ in seen if status == 429)
    assert len(served) >= 4 and refused[len(refused) // 2] < served[len(served) // 2]
    assert gauge(server, "quire_requests_refused_early_total") > 0
    until(lambda: gauge(server, "quire_requests_running") == 0)
    assert gauge(server, "quire_requests_waiting") == gauge(server, "quire_kv_blocks_used") == 0


def test_the_more_urgent_request_goes_first(server: Server) -> None:
    order: list[str] = []

    def client(name: str, priority: int, max_tokens: int) -> None:
        status, _, _ = ask(server, priority=priority, max_tokens=max_tokens)
        assert status == 200
        order.append(name)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(client, "holds the place", 0, 900)]
        until(lambda: gauge(server, "quire_requests_running") == 1)
        for waiting, (name, priority) in enumerate((("later", 5), ("same", 5), ("urgent", -5)), 1):
            jobs.append(pool.submit(client, name, priority, 20))
            until(lambda n=waiting: gauge(server, "quire_requests_waiting") == n)
        for job in jobs:
            job.result()
    assert order == ["holds the place", "urgent", "later", "same"]


def test_a_direct_call_is_told_when_to_come_back_and_blocks_have_owners(server: Server) -> None:
    def request(name: str) -> engine_pb2.GenerateRequest:
        params = common_pb2.SamplingParams(seed=1, max_tokens=1500, ignore_eos=True)
        return engine_pb2.GenerateRequest(
            request_id=name, prompt_token_ids=range(5, 300), sampling_params=params
        )

    with grpc.insecure_channel(server.engine_address) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        calls = [stub.Generate(request(f"call-{i}")) for i in range(4)]
        until(lambda: gauge(server, "quire_requests_waiting") == 3)
        refused = stub.Generate(request("call-5"))
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(refused.trailing_metadata())
        assert trailing["quire-error"] == "queue_full" and int(trailing["retry-after-ms"]) > 0
        environ = clean_environ(**server.environ)
        done = run("blocks", "--limit", "3", environ=environ)
        assert done.returncode == 0, done.stderr
        head, _, first, *_ = done.stdout.splitlines()
        assert "blocks of 256 tokens" in head and "call-" in first and " used " in first
        for call in calls:
            call.cancel()
    until(lambda: gauge(server, "quire_requests_running") == 0)
    done = run("blocks", "--id", "99999999", environ=environ)
    assert done.returncode == 1 and "does not exist" in done.stderr
