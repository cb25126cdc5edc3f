"""Answers of the gateway, streamed and whole, against a fake engine over real sockets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_builders import IM_END, served

from fakes.engine_server import LENGTH, FakeEngine, Reply
from quire.v1 import common_pb2
from quire.wire import unpack_i32

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi"}


def says(text: str, **kwargs: Any) -> Reply:
    """The engine writes this text and ends by itself."""
    return Reply([*text.encode(), IM_END], **kwargs)


async def test_chat_answer_has_text_and_usage(folder: Path) -> None:
    async with (
        FakeEngine(says("Hello", num_cached_tokens=7)) as engine,
        served(engine, folder) as s,
    ):
        status, body, headers = await s.post("/v1/chat/completions", CHAT)
    assert status == 200
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["model"] == "fake" and body["system_fingerprint"] == "fp_fake"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    prompt = b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(prompt) - 12 + 1 - 12 + 1 - 10 + 1
    assert body["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 6,
        "total_tokens": tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 7},
    }
    assert headers["x-request-id"].startswith("req-")
    params = engine.submits[0].sampling_params
    assert params.max_tokens == 512 - tokens and params.HasField("seed")


async def test_completion_answer(folder: Path) -> None:
    async with (
        FakeEngine(says("there is more than sixteen")) as engine,
        served(engine, folder) as s,
    ):
        _, body, _ = await s.post("/v1/completions", TEXT)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "text": "there is more th",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == 16
    assert list(unpack_i32(engine.submits[0].prompt_token_ids)) == list(b"hi")


async def test_chat_stream_bytes(folder: Path) -> None:
    async with FakeEngine(says("né")) as engine, served(engine, folder) as s:
        events = await s.events("/v1/chat/completions", CHAT)
    first = json.loads(events[0].removeprefix("data: "))
    open_ = ',"logprobs":null,"finish_reason":null}]}'
    head = (
        f'{{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
        '"model":"fake","system_fingerprint":"fp_fake","choices":[{"index":0,"delta":'
    )
    assert events == [
        f'data: {head}{{"role":"assistant","content":""}}{open_}',
        f'data: {head}{{"content":"n"}}{open_}',
        f'data: {head}{{"content":"é"}}{open_}',
        f'data: {head}{{}},"logprobs":null,"finish_reason":"stop","stop_reason":null}}]}}',
        "data: [DONE]",
    ]


async def test_completion_stream_with_usage(folder: Path) -> None:
    reply = Reply(b"abc", finish_reason=LENGTH, chunk=3, num_cached_tokens=1)
    body = TEXT | {"stream_options": {"include_usage": True}, "max_tokens": 3}
    async with FakeEngine(reply) as engine, served(engine, folder) as s:
        chunks = await s.chunks("/v1/completions", body)
    assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["abc", ""]
    assert [c["usage"] for c in chunks[:-1]] == [None, None]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_continuous_usage_grows(folder: Path) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with FakeEngine(Reply(b"abc", delay=0.01)) as engine, served(engine, folder) as s:
        chunks = await s.chunks("/v1/completions", TEXT | {"stream_options": options})
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts[-1] == 3 and counts == sorted(counts)


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_have_their_own_seeds(folder: Path, stream: bool) -> None:
    def script(submit: Any) -> Reply:
        return says(str(submit.sampling_params.seed % 10), delay=0.01)

    async with FakeEngine(script) as engine, served(engine, folder) as s:
        body = CHAT | {"n": 3, "seed": 5}
        if stream:
            chunks = await s.chunks("/v1/chat/completions", body)
            roles = [c["choices"][0]["delta"].get("role") for c in chunks[:3]]
            assert roles == ["assistant"] * 3
            texts = ["", "", ""]
            for chunk in chunks:
                choice = chunk["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
        else:
            _, answer, _ = await s.post("/v1/chat/completions", body)
            texts = [c["message"]["content"] for c in answer["choices"]]
            assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
            assert answer["usage"]["completion_tokens"] == 6
    seeds = [submit.sampling_params.seed for submit in engine.submits]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert texts == [str(seed % 10) for seed in seeds]


async def test_several_prompts(folder: Path) -> None:
    def script(submit: Any) -> Reply:
        return says(bytes(list(unpack_i32(submit.prompt_token_ids))).decode().upper())

    async with FakeEngine(script) as engine, served(engine, folder) as s:
        _, body, _ = await s.post("/v1/completions", TEXT | {"prompt": ["a", "bc"], "echo": True})
        _, ids, _ = await s.post("/v1/completions", TEXT | {"prompt": [[100], [101, 102]], "n": 2})
    assert [c["text"] for c in body["choices"]] == ["aA", "bcBC"]
    assert body["usage"]["prompt_tokens"] == 3
    assert [c["text"] for c in ids["choices"]] == ["D", "D", "EF", "EF"]
    assert ids["usage"]["prompt_tokens"] == 3


async def test_stop_string_ends_the_engine_and_the_count(folder: Path) -> None:
    reply = Reply(b"one two three four", hang=True, delay=0.001)
    body = TEXT | {"stop": [" th"], "max_tokens": 100}
    async with FakeEngine(reply) as engine, served(engine, folder) as s:
        _, answer, _ = await s.post("/v1/completions", body)
        await engine.wait(lambda: engine.cancels)
        _, shown, _ = await s.post("/v1/completions", body | {"include_stop_str_in_output": True})
    choice = answer["choices"][0]
    assert choice["text"] == "one two"
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == " th"
    assert answer["usage"]["completion_tokens"] == len("one two th")
    assert shown["choices"][0]["text"] == "one two th"


async def test_stop_token_id_is_the_stop_reason(folder: Path) -> None:
    reply = Reply(b"abcd", stop_token_id=ord("d"))
    body = TEXT | {"stop_token_ids": [ord("d")]}
    async with FakeEngine(reply) as engine, served(engine, folder) as s:
        _, answer, _ = await s.post("/v1/completions", body)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["stop_reason"] == ord("d")


async def test_chat_logprobs(folder: Path) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    async with FakeEngine(Reply([0xC3, 0xA9])) as engine, served(engine, folder) as s:
        _, answer, _ = await s.post("/v1/chat/completions", body)
        chunks = await s.chunks("/v1/chat/completions", body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert content[0]["logprob"] == -0.5
    assert [t["bytes"] for t in content[0]["top_logprobs"]] == [[0], [1]]
    streamed = [
        entry
        for chunk in chunks
        if (found := chunk["choices"][0]["logprobs"])
        for entry in found["content"]
    ]
    assert streamed == content


async def test_completion_logprobs(folder: Path) -> None:
    async with FakeEngine(Reply(b"abc")) as engine, served(engine, folder) as s:
        _, answer, _ = await s.post("/v1/completions", TEXT | {"logprobs": 1, "echo": False})
        _, bare, _ = await s.post("/v1/completions", TEXT | {"logprobs": 0})
        chunks = await s.chunks("/v1/completions", TEXT | {"logprobs": 1})
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{c: -0.5, "\0": -1.0} for c in "abc"],
        "text_offset": [0, 1, 2],
    }
    assert bare["choices"][0]["logprobs"]["top_logprobs"] is None
    offsets = [
        offset
        for chunk in chunks
        if (found := chunk["choices"][0]["logprobs"])
        for offset in found["text_offset"]
    ]
    assert offsets == [0, 1, 2]


async def test_engine_error_before_any_token_is_a_status(folder: Path) -> None:
    full = common_pb2.Error(name="queue_full", message="4096 wait.", retry_after_s=2.5)
    async with FakeEngine(Reply([], error=full)) as engine, served(engine, folder) as s:
        for extra in ({}, {"stream": True}):
            status, body, headers = await s.post("/v1/chat/completions", CHAT | extra)
            assert status == 429 and body["error"]["code"] == "queue_full"
            assert int(headers["Retry-After"]) >= 3 and "x-should-retry" not in headers


async def test_engine_error_in_a_stream_is_an_event_without_done(folder: Path) -> None:
    crashed = common_pb2.Error(name="request_crashed_worker", message="It crashed two workers.")
    reply = Reply(b"ab", error=crashed, delay=0.01)
    async with FakeEngine(reply) as engine, served(engine, folder) as s:
        events = await s.events("/v1/chat/completions", CHAT)
        status, _, headers = await s.post("/v1/chat/completions", CHAT)
    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {
            "message": "It crashed two workers.",
            "type": "server_error",
            "param": None,
            "code": "request_crashed_worker",
        }
    }
    assert "data: [DONE]" not in events and 'finish_reason":"' not in "".join(events)
    assert status == 500 and headers["x-should-retry"] == "false"


async def test_keep_alive_comments_fill_silence(folder: Path) -> None:
    reply = Reply(b"ab", finish_reason=LENGTH, first_delay=0.25, delay=0.25)
    async with (
        FakeEngine(reply) as engine,
        served(engine, folder, keep_alive_interval=0.05) as s,
    ):
        events = await s.events("/v1/completions", TEXT)
        assert events[0] == ": keep-alive"
        assert events.count(": keep-alive") >= 4
        chunks = await s.chunks("/v1/completions", TEXT)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "ab"


async def test_openai_client(folder: Path) -> None:
    async with (
        FakeEngine(says("Hello, world")) as engine,
        served(engine, folder) as s,
        openai.AsyncOpenAI(base_url=s.url + "/v1", api_key="none") as client,
    ):
        assert [m.id for m in (await client.models.list()).data] == ["fake"]
        assert (await client.models.retrieve("fake")).id == "fake"
        chat = await client.chat.completions.create(model="fake", messages=CHAT["messages"])
        assert chat.choices[0].message.content == "Hello, world"
        assert chat.usage and chat.usage.completion_tokens == 13
        text = await client.completions.create(model="fake", prompt="x", max_tokens=5)
        assert text.choices[0].text == "Hello" and text.choices[0].finish_reason == "length"
        stream = await client.chat.completions.create(
            model="fake",
            messages=CHAT["messages"],
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces, usage = [], None
        async for chunk in stream:
            if chunk.choices:
                pieces.append(chunk.choices[0].delta.content or "")
            usage = chunk.usage or usage
        assert "".join(pieces) == "Hello, world"
        assert usage and usage.prompt_tokens_details
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(model="gpt-4", messages=CHAT["messages"])
        assert raised.value.code == "model_not_found" and raised.value.param == "model"


async def test_openai_client_raises_on_an_error_in_the_stream(folder: Path) -> None:
    lost = common_pb2.Error(name="worker_lost", message="No worker came back.")
    async with (
        FakeEngine(Reply(b"a", error=lost)) as engine,
        served(engine, folder) as s,
        openai.AsyncOpenAI(base_url=s.url + "/v1", api_key="none") as client,
    ):
        stream = await client.completions.create(model="fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="No worker came back"):
            async for _ in stream:
                pass


async def test_sixty_four_streams_are_not_mixed_up(folder: Path) -> None:
    def script(submit: Any) -> Reply:
        prompt = bytes(list(unpack_i32(submit.prompt_token_ids))).decode()
        return says(f"<{prompt}>" * 5, delay=0.001)

    async def one(s: Any, k: int) -> None:
        body = {"prompt": str(k), "max_tokens": 200}
        chunks = await s.chunks("/v1/completions", body)
        text = "".join(c["choices"][0]["text"] for c in chunks)
        assert text == f"<{k}>" * 5

    async with FakeEngine(script) as engine, served(engine, folder) as s:
        await asyncio.gather(*(one(s, k) for k in range(64)))
        assert s.gateway.engine.num_open == 0 and s.gateway.active == 0
