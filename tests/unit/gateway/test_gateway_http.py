"""HTTP manners: errors in one shape, ids, keys, body limits, health, models."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from gateway_builders import served, until

from fakes.engine_server import FakeEngine, Reply
from quire.version import __version__

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def is_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
    ],
)
async def test_errors_have_one_shape(
    folder: Path, method: str, path: str, status: int, code: str
) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        async with s.http.request(method, s.url + path) as response:
            body = await response.json()
            assert response.status == status and is_error(body)
            assert body["error"]["code"] == code
            assert response.headers["x-should-retry"] == "false"
            assert response.headers["x-request-id"]
            assert response.content_type == "application/json"
            if status == 405:
                assert response.headers["Allow"]


async def test_request_id_is_echoed_when_it_is_harmless(folder: Path) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        for sent, echoed in [
            ("a-B_c.9", True),
            ("x" * 64, True),
            ("x" * 65, False),
            ("a b", False),
        ]:
            status, _, headers = await s.post(
                "/v1/chat/completions", CHAT, headers={"x-request-id": sent}
            )
            assert status == 200 and (headers["x-request-id"] == sent) is echoed
        async with s.http.post(
            s.url + "/v1/chat/completions",
            json=CHAT | {"stream": True},
            headers={"x-request-id": "twice"},
        ) as response:
            assert response.headers["x-request-id"] == "twice"
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        _, _, headers = await s.get("/nowhere", headers={"x-request-id": "twice"})
        assert headers["x-request-id"] == "twice"
        ids = [submit.request_id for submit in engine.submits]
    assert len(set(ids)) == len(ids) and ids[-1].startswith("twice-")


async def test_keys_are_asked_for_everywhere_but_on_the_open_routes(folder: Path) -> None:
    async with FakeEngine() as engine, served(engine, folder, api_key=("k1", "kéy2")) as s:
        for route in s.gateway_routes():
            path = route.replace("{id}", "fake")
            status, body, headers = await s.get(path)
            if path in ("/health", "/ready", "/ping", "/metrics"):
                assert status == 200, path
            else:
                assert status == 401 and is_error(body), path
                assert body["error"]["code"] == "invalid_api_key"
                assert headers["WWW-Authenticate"] == "Bearer"
        for headers in (
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic k1"},
            {"Authorization": "k1"},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer k1 k1"},
            {"x-api-key": ""},
        ):
            assert (await s.get("/v1/models", headers=headers))[0] == 401
        for headers in (
            {"Authorization": "Bearer k1"},
            {"Authorization": "bearer kéy2"},
            {"x-api-key": "k1"},
        ):
            assert (await s.get("/v1/models", headers=headers))[0] == 200
        for key in ("k1", "kéy2"):
            await s.post("/v1/chat/completions", CHAT, headers={"x-api-key": key})
        tenants = {submit.tenant for submit in engine.submits}
        assert len(tenants) == 2 and "" not in tenants


async def test_large_body_is_refused_unread(folder: Path) -> None:
    async def flood(total: int) -> Any:
        block = b" " * (1 << 20)
        for _ in range(total // len(block)):
            yield block

    from quire_gateway.metrics import resident_memory

    async with FakeEngine() as engine, served(engine, folder, max_body_bytes=1 << 19) as s:
        status, body, headers = await s.post(
            "/v1/completions", {"prompt": "x" * (1 << 19), "model": "fake"}
        )
        assert status == 413 and is_error(body) and headers["x-should-retry"] == "false"
        before = resident_memory()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(s.url.rpartition(":")[2]))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n"
            b"Content-Type: application/json\r\n\r\n" + b" " * 4096
        )
        answer = await reader.read(4096)
        assert b" 413 " in answer and b"payload_too_large" in answer
        writer.close()
        try:  # chunked: the length is not known beforehand
            async with s.http.post(
                s.url + "/v1/completions",
                data=flood(100 << 20),
                headers={"Content-Type": "application/json"},
            ) as response:
                assert response.status == 413
        except (ConnectionError, OSError):
            pass  # the answer came while the body was still being written
        assert resident_memory() - before < 32 << 20
        assert (await s.post("/v1/chat/completions", CHAT))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "identity"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_media_types(folder: Path, headers: dict[str, str], status: int) -> None:
    sent = {"Content-Type": "application/json"} | headers
    async with FakeEngine() as engine, served(engine, folder) as s:
        async with s.http.post(
            s.url + "/v1/chat/completions", data=json.dumps(CHAT), headers=sent
        ) as response:
            assert response.status == status
            if status != 200:
                assert is_error(await response.json())


async def test_unexpected_failure_is_told_without_its_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        monkeypatch.setattr(s.gateway.text.tokenizer, "encode", lambda *_: 1 / 0)
        status, body, headers = await s.post("/v1/chat/completions", CHAT)
    assert status == 500 and body["error"]["code"] == "internal_error"
    assert headers["x-request-id"] in body["error"]["message"]
    assert "division" not in body["error"]["message"] and "ZeroDivision" in caplog.text
    assert headers["x-should-retry"] == "false" and s.gateway.active == 0


async def test_health_while_loading_and_after(folder: Path) -> None:
    async with FakeEngine(ready=False, status="loading weights") as engine:
        async with served(engine, folder, wait=False) as s:
            await until(lambda: s.gateway.engine.status == "loading weights")
            status, body, _ = await s.get("/health")
            assert status == 503 and body["status"] == "loading"
            assert body["problem"] == "loading weights"
            assert (await s.get("/ready"))[0] == 503 and (await s.get("/ping"))[0] == 200
            status, body, headers = await s.post("/v1/chat/completions", CHAT)
            assert status == 503 and body["error"]["code"] == "not_ready"
            assert headers["Retry-After"] == "2"
            engine.model.ready = True
            await until(lambda: s.gateway.engine.connected)
            assert (await s.get("/ready"))[0] == 200
            engine.load.prefix_query_tokens, engine.load.prefix_hit_tokens = 8, 2
            engine.load.memory_bytes = 1 << 30
            await s.post("/v1/chat/completions", CHAT)
            status, body, _ = await s.get("/health")
    assert status == 200 and body["status"] == "ok"
    assert body["total_requests"] == 1 and body["cache_hit_rate"] == 0.25
    assert body["memory_usage_mb"] > 1024 and body["uptime_seconds"] > 0


async def test_health_names_what_is_wrong(folder: Path) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        engine.load.healthy, engine.load.problem = False, "worker rank 0 is frozen"
        status, body, _ = await s.get("/health")
        assert status == 503 and body["status"] == "unhealthy"
        assert body["problem"] == "worker rank 0 is frozen"
        engine.load.healthy, engine.load.draining = True, True
        assert (await s.get("/ready"))[1]["status"] == "draining"
        await engine.stop()
        await until(lambda: not s.gateway.engine.connected)
        status, body, _ = await s.get("/health")
        assert status == 503 and "is away" in body["problem"]


async def test_models_and_version(folder: Path) -> None:
    names = ("org/name", "alias")
    async with FakeEngine() as engine, served(engine, folder, served_model_name=names) as s:
        _, body, _ = await s.get("/v1/models")
        assert [m["id"] for m in body["data"]] == list(names)
        assert body["data"][0]["max_model_len"] == 512 and body["data"][0]["object"] == "model"
        assert (await s.get("/v1/models/org/name"))[1]["id"] == "org/name"
        assert (await s.get("/version"))[1] == {"version": __version__}
        _, answer, _ = await s.post("/v1/chat/completions", CHAT | {"model": "alias"})
        assert answer["model"] == "org/name"


async def test_one_log_line_per_request(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with FakeEngine(Reply(b"abc")) as engine, served(engine, folder) as s:
        await s.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine"})
        await s.post("/v1/chat/completions", CHAT | {"n": 99})
        await s.get("/ping")
    good, bad = [r for r in caplog.records if r.message == "request"]
    assert (good.request_id, good.tokens, good.status, good.finish_reason) == (  # type: ignore[attr-defined]
        "mine", 3, 200, "stop",
    )  # fmt: skip
    assert good.route == "/v1/chat/completions"  # type: ignore[attr-defined]
    assert 0 < good.ttft_ms <= good.duration_ms  # type: ignore[attr-defined]
    assert (bad.status, bad.error, bad.ttft_ms) == (400, "invalid_request", None)  # type: ignore[attr-defined]


async def test_trace_context_reaches_the_engine(folder: Path) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with FakeEngine() as engine, served(engine, folder) as s:
        headers = {"traceparent": parent, "tracestate": "a=b"}
        await s.post("/v1/chat/completions", CHAT, headers=headers)
        await s.post("/v1/chat/completions", CHAT, headers={"traceparent": "evil\tvalue"})
    first, second = (submit.trace for submit in engine.submits)
    assert (first.traceparent, first.tracestate) == (parent, "a=b")
    assert second.traceparent == ""


async def test_metrics_page_joins_all_services(folder: Path) -> None:
    from quire.v1 import engine_pb2

    worker = (
        b"# HELP quire_step_seconds Step\n# TYPE quire_step_seconds gauge\nquire_step_seconds 2\n"
    )
    async with FakeEngine(Reply(b"abc", delay=0.005)) as engine, served(engine, folder) as s:
        for rank in (0, 1):
            page = engine_pb2.MetricsText(service=f"worker-{rank}", text=worker)
            engine.load.metrics.append(page)
        await s.post("/v1/chat/completions", CHAT)
        page = await (await s.http.get(s.url + "/metrics")).text()
        await engine.stop()
        alone = await (await s.http.get(s.url + "/metrics")).text()
    assert page.count("# TYPE quire_step_seconds gauge") == 1
    assert 'quire_step_seconds{service="worker-0"} 2' in page
    assert 'quire_step_seconds{service="worker-1"} 2' in page
    for line in (
        'quire_http_requests_total{service="gateway",route="/v1/chat/completions",status="200"} 1',
        'quire_requests_total{service="gateway",finish_reason="stop"} 1.0',
        'quire_generation_tokens_total{service="gateway"} 3.0',
        'quire_request_time_to_first_token_seconds_count{service="gateway"} 1.0',
        'quire_request_inter_token_seconds_count{service="gateway"} 2.0',
        'quire_request_duration_seconds_count{service="gateway"} 1.0',
        'llm_engine_requests_total{service="gateway"} 1.0',
        'llm_engine_request_duration_ms_count{service="gateway"} 1.0',
        'quire_engine_connected{service="gateway"} 1.0',
    ):
        assert line in page
    assert "llm_engine_cache_hit_rate" in page and "llm_engine_memory_usage_bytes" in page
    assert "_created" not in page and "worker-0" not in alone
    assert 'quire_engine_connected{service="gateway"} 0.0' in alone or "gateway" in alone
    lint(page)


def lint(page: str) -> None:
    """The rules of `promtool check metrics` that names can break."""
    families: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in families, f"{name} has two TYPE lines"
            families[name] = kind
    for name, kind in families.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(gauge|counter|histogram|summary|info)$", name), name
        if name.startswith("quire_"):
            assert not re.search(r"_(ms|milliseconds|mb|kb|minutes|percent)(_|$)", name), name
        assert f"# HELP {name} " in page
