"""Three processes, real clients: the OpenAI SDK, plain gRPC stubs, sockets that go away."""

from __future__ import annotations

import asyncio
import json
import socket

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from flow.conftest import Server
from flow.processes import until
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc


def load(server: Server) -> engine_pb2.GetLoadResponse:
    with grpc.insecure_channel(server.engine_address) as channel:
        return engine_pb2_grpc.EngineServiceStub(channel).GetLoad(engine_pb2.GetLoadRequest())


def wait_idle(server: Server) -> None:
    """Until nothing runs and no request holds a block."""

    def idle() -> bool:
        now = load(server)
        return not (now.num_running or now.num_waiting or now.num_blocks_used)

    until(idle, 10, "all blocks returned")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def test_chat_with_the_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Tell me a story about a fox."}],
        temperature=0,
        max_tokens=200,
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content and choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_streamed_text_equals_the_whole(client: openai.OpenAI) -> None:
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me a story about a bear."}],
        "temperature": 0,
        "max_tokens": 120,
    }
    whole = client.chat.completions.create(**request)
    pieces, usages, reasons = [], [], []
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.usage:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
    assert "".join(pieces) == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert [u.completion_tokens for u in usages] == [whole.usage.completion_tokens]


def test_completions_n_seed_stop_and_cached_tokens(client: openai.OpenAI) -> None:
    request = {
        "model": "demo", "prompt": "Once upon a time there was a little fox who lived in",
        "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2,
    }  # fmt: skip
    first, second = (client.completions.create(**request) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.choices[0].text != first.choices[1].text
    word = first.choices[0].text.split()[2]
    stopped = client.completions.create(**{**request, "n": 1, "stop": [word]})
    assert word not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens <= 24
    long = {"model": "demo", "prompt": list(range(100, 180)), "max_tokens": 2}
    client.completions.create(**long)
    again = client.completions.create(**long)
    assert again.usage.prompt_tokens_details.cached_tokens >= 64


def test_models_and_errors_through_the_client(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert models[0].id == "demo" and models[0].max_model_len > 0
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"


async def test_64_streams_at_once_are_complete_and_not_mixed_up(server: Server) -> None:
    animals = ("fox", "bear", "owl", "cat", "dog", "hen", "frog", "mouse")

    async def one(client: openai.AsyncOpenAI, index: int) -> tuple[str, str | None, int]:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[
                {"role": "user", "content": f"Story {index} about a {animals[index % 8]}, please."}
            ],
            temperature=1.0,
            seed=index,
            max_tokens=40 + index,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, reason, tokens = "", None, 0
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                reason = chunk.choices[0].finish_reason or reason
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        return text, reason, tokens

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=100
    ) as client:
        together = await asyncio.gather(*(one(client, index) for index in range(64)))
        assert all(reason in ("stop", "length") for _, reason, _ in together)
        for index in range(0, 64, 7):
            assert await one(client, index) == together[index]
    wait_idle(server)


def test_plain_grpc_stub_generates(server: Server) -> None:
    with grpc.insecure_channel(server.engine_address) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        request = engine_pb2.GenerateRequest(
            prompt_token_ids=[300, 301, 302],
            sampling_params=common_pb2.SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        )
        messages = list(stub.Generate(request, timeout=30))
        assert sum(len(message.token_ids) for message in messages) == 9
        assert messages[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert messages[-1].usage.num_output_tokens == 9
        model = stub.GetModel(engine_pb2.GetModelRequest(), timeout=5)
        assert model.ready and model.vocab_size > 0 and len(model.model_digest) == 32
        request.prompt_token_ids.append(1 << 30)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request, timeout=30))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_grpc_health_and_reflection_answer(server: Server) -> None:
    with grpc.insecure_channel(server.engine_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "quire.v1.EngineService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        names = {
            s.name for r in stub.ServerReflectionInfo(asked, timeout=5)
            for s in r.list_services_response.service
        }  # fmt: skip
        assert {"quire.v1.EngineService", "grpc.health.v1.Health"} <= names


def test_a_disconnect_frees_its_blocks(server: Server) -> None:
    body = json.dumps(
        {"model": "demo", "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        assert b"200 OK" in client.recv(4096)
        until(lambda: load(server).num_running == 1, 5)
    wait_idle(server)


def test_metrics_of_all_services_on_one_page(server: Server) -> None:
    server.post("/v1/completions", {"model": "demo", "prompt": "hi", "max_tokens": 3})

    def page() -> str | None:
        text = server.get("/metrics")[1]
        return text if 'service="worker' in text else None

    text = until(page, 10, "the worker's page")
    for service in ("gateway", "scheduler", "worker-0"):
        assert f'service="{service}"' in text
    for name in (
        "llm_engine_requests_total", "llm_engine_request_duration_ms",
        "llm_engine_cache_hit_rate", "llm_engine_memory_usage_bytes",
    ):  # fmt: skip
        assert f"# TYPE {name}" in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_health_tells_the_story(server: Server) -> None:
    status, text = server.get("/health")
    assert status == 200
    body = json.loads(text)
    assert {
        "status", "uptime_seconds", "total_requests", "cache_hit_rate", "memory_usage_mb",
    } <= set(body)  # fmt: skip
    assert server.get("/ready")[0] == 200 and server.get("/ping")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", b"{", 400, None),
        ("/v1/chat/completions", b"\xff\xfe", 400, None),
        ("/v1/chat/completions", b'{"model":"demo","messages":[]}', 400, "messages"),
        ("/v1/completions", b'{"model":"demo","prompt":"x","temperature":NaN}', 400, None),
        ("/v1/completions", b'{"model":"demo","prompt":"x","max_tokens":-1}', 400, "max_tokens"),
        ("/v1/completions", b'{"model":"demo","prompt":[99999999]}', 400, "prompt"),
        ("/v1/completions", b'{"model":"demo","prompt":[1' + b",1" * 9999 + b"]}", 400, "prompt"),
        ("/v1/completions", b'{"model":"nope","prompt":"x"}', 404, "model"),
        ("/v1/nothing", b"{}", 404, None),
        ("/v1/completions", b" " * (9 << 20), 413, None),
    ],
)  # fmt: skip
def test_bad_input_gets_an_openai_error(
    server: Server, path: str, body: bytes, status: int, param: str | None
) -> None:
    from flow.processes import post

    got, answer = post(server.port, path, body)
    error = json.loads(answer)["error"]
    assert got == status and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["message"]
    assert server.get("/health")[0] == 200
