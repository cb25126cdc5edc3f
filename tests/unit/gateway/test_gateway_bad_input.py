"""Bad input: each a 4xx in one shape that names the field, and the server keeps serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gateway_builders import served

from fakes.engine_server import FakeEngine

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "hi"}
HUGE = 10**400
SECRET = "x" * 100_000

# raw bodies: all 400 invalid_json
RAW: dict[str, bytes] = {
    "empty": b"",
    "blanks": b" \n ",
    "not json": b"hello",
    "cut": b'{"model": "fake", ',
    "trailing comma": b'{"model": "fake",}',
    "two values": b"{} {}",
    "single quotes": b"{'model': 'fake'}",
    "list": b"[]",
    "string": b'"fake"',
    "number": b"1",
    "null": b"null",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "-Infinity": b'{"temperature": -Infinity}',
    "bad utf-8": b'{"prompt": "\xff\xfe"}',
    "overlong utf-8": b'{"prompt": "\xc0\x80"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "escaped surrogate": b'{"model": "fake", "prompt": "a\\ud83d"}',
    "surrogate key": b'{"model": "fake", "prompt": "a", "\\uDFFF": 1}',
    "surrogate in a list": b'{"prompt": [["\\udc00"]]}',
    "5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "deep list": b'{"a": ' + b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "control character": b'{"prompt": "a\nb"}',
    "NUL": b'\x00{"prompt": "a"}',
}

# (change to the body, param in the answer)
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"model": ["fake"]}, "model"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.01}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": HUGE}, "temperature"),
    ({"temperature": -HUGE}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": "1"}, "top_p"),
    ({"top_p": HUGE}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 1 << 40}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 11}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"presence_penalty": {}}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1_000_000}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 100_000}, "min_tokens"),
    ({"seed": "1"}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": -HUGE}, "seed"),
    ({"stop": 1}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": 1}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1.0": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": HUGE}}, "logit_bias"),
    ({"logit_bias": {"1": "1"}}, "logit_bias"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"logit_bias": {str(k): 0 for k in range(1025)}}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"include_stop_str_in_output": 0}, "include_stop_str_in_output"),
    ({"add_special_tokens": "yes"}, "add_special_tokens"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"priority": "high"}, "priority"),
    ({"priority": 1 << 31}, "priority"),
    ({"cache_salt": 1}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [None]}, "messages"),
    ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages"),
    ({"messages": [{"role": SECRET, "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": 1, "text": "a"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "hi", "name": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": "hi"}] * 9000}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": "5", "max_tokens": 5}, "max_completion_tokens"),
    ({"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    ({"add_generation_prompt": 1}, "add_generation_prompt"),
    ({"continue_final_message": "yes"}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": None}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"__class__": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a" * 65: 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": "x" * 4097}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {f"a{k}": 1 for k in range(33)}}, "chat_template_kwargs"),
]
TEXT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", ["b"]]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": [1, HUGE]}, "prompt"),
    ({"prompt": [[1], [999]]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 100_000}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": "1"}, "logprobs"),
    ({"echo": 1}, "echo"),
]
# what would change the answer and is not there: 400 with code unsupported
UNSUPPORTED_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"best_of": 3}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
]
UNSUPPORTED_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"echo": True}, "echo"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "a"}]}, "messages"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
        "messages",
    ),
    *(
        ({"messages": [{"role": "user", "content": [{"type": kind}]}]}, "messages")
        for kind in ("image_url", "input_audio", "file", "video_url", SECRET)
    ),
]
UNSUPPORTED_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "end"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
]
# null is absent, unknown fields are left alone, harmless values pass
ABSENT = (
    "model temperature top_p top_k min_p n max_tokens min_tokens seed stop stop_token_ids "
    "logit_bias stream stream_options user response_format logprobs priority cache_salt best_of "
    "ignore_eos presence_penalty frequency_penalty repetition_penalty tools suffix"
).split()
FINE_BOTH: list[dict[str, Any]] = [
    dict.fromkeys(ABSENT),
    {"no_such_field": {"deep": [1]}, "user": "me", "metadata": {"a": "b"}, "store": False},
    {"response_format": {"type": "text"}, "best_of": 1, "bad_words": [], "suffix": ""},
    {"temperature": 0, "top_k": -1, "seed": -1, "stop": [], "logit_bias": {}, "n": 2},
    {"stop": ["a", "b"], "stop_token_ids": [299], "logit_bias": {"299": -100}, "min_tokens": 1},
    {"temperature": 1e-9, "top_p": 1, "top_k": 5, "min_p": 0.5, "repetition_penalty": 1.1},
]  # fmt: skip
FINE_CHAT: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "none", "modalities": ["text"], "parallel_tool_calls": True},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
    {"messages": [{"role": "user", "content": ""}], "max_completion_tokens": 5, "max_tokens": 1},
    {"chat_template_kwargs": {"enable_thinking": False, "effort": "low", "k": 1.5}},
    {"messages": [{"role": "user", "content": "nul \0 and \u2028"}]},
]
FINE_TEXT: list[dict[str, Any]] = [
    {"prompt": [1, 2]},
    {"prompt": [[1], [2, 299]]},
    {"prompt": ["a", "b"], "echo": True},
    {"prompt": "😀\0", "logprobs": 0},
]


async def answer(s: Any, path: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with s.http.post(
        s.url + path, data=data, headers={"Content-Type": "application/json"}
    ) as response:
        text = await response.text()
        assert len(text) < 8192, "an error must not echo what was sent"
        assert SECRET[:200] not in text
        return response.status, json.loads(text) if response.status != 200 else None


async def refused(
    folder: Path,
    path: str,
    base: dict[str, Any],
    cases: list[tuple[dict[str, Any], str]],
    code: Any,
) -> None:
    wrong = []
    async with FakeEngine() as engine, served(engine, folder) as s:
        for change, param in cases:
            status, body = await answer(s, path, base | change)
            error = (body or {}).get("error", {})
            good = (
                status == 400
                and error.get("type") == "invalid_request_error"
                and error.get("param") == param
                and error.get("code") == code
                and param in error["message"]
            )
            if not good:
                wrong.append((str(change)[:80], status, body))
        assert (await answer(s, path, base))[0] == 200
        assert len(engine.submits) == 1, "nothing wrong may reach the engine"
    assert not wrong


PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
own = pytest.mark.parametrize("path", PATHS)


@own
async def test_bodies_that_are_no_json_object(folder: Path, path: str) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        for name, raw in RAW.items():
            status, body = await answer(s, path, raw)
            assert status == 400, name
            assert body["error"]["code"] == "invalid_json", (name, body)
        assert (await answer(s, path, PATHS[path]))[0] == 200


@own
async def test_bad_values_name_their_field(folder: Path, path: str) -> None:
    await refused(folder, path, PATHS[path], BOTH, None)


async def test_bad_chat_fields(folder: Path) -> None:
    await refused(folder, "/v1/chat/completions", CHAT, CHAT_ONLY, None)


async def test_bad_completion_fields(folder: Path) -> None:
    await refused(folder, "/v1/completions", TEXT, TEXT_ONLY, None)


@own
async def test_unsupported_fields_are_refused(folder: Path, path: str) -> None:
    own_cases = UNSUPPORTED_CHAT if "chat" in path else UNSUPPORTED_TEXT
    await refused(folder, path, PATHS[path], UNSUPPORTED_BOTH + own_cases, "unsupported")


@own
async def test_harmless_oddities_pass(folder: Path, path: str) -> None:
    cases = FINE_BOTH + (FINE_CHAT if "chat" in path else FINE_TEXT)
    async with FakeEngine() as engine, served(engine, folder) as s:
        for change in cases:
            status, body = await answer(s, path, PATHS[path] | change)
            assert status == 200, (change, body)


@own
@pytest.mark.parametrize("model", ["gpt-4", "", "fake ", "../fake", SECRET])
async def test_unknown_model(folder: Path, path: str, model: str) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        status, body = await answer(s, path, PATHS[path] | {"model": model})
    assert status == 404
    assert (body["error"]["code"], body["error"]["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "change", "param", "numbers"),
    [
        ("/v1/completions", {"prompt": "x" * 512}, "prompt", ("512",)),
        ("/v1/completions", {"prompt": [1] * 513}, "prompt", ("512", "513")),
        ("/v1/completions", {"prompt": "x" * 100_000}, "prompt", ("100000",)),
        ("/v1/completions", {"prompt": "x" * 500, "max_tokens": 13}, "max_tokens", ("513", "12")),
        ("/v1/completions", {"max_tokens": 512}, "max_tokens", ("514", "510")),
        ("/v1/completions", {"max_tokens": 1 << 24}, "max_tokens", ("512",)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 600}]},
            "messages",
            ("512",),
        ),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 512},
            "max_completion_tokens",
            ("512",),
        ),
    ],
)
async def test_what_does_not_fit_the_context_is_told_in_numbers(
    folder: Path, path: str, change: dict[str, Any], param: str, numbers: tuple[str, ...]
) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        status, body = await answer(s, path, PATHS[path] | change)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["param"] == param
    for number in numbers:
        assert number in body["error"]["message"]


async def test_default_max_tokens_shrinks_to_what_is_left(folder: Path) -> None:
    async with FakeEngine() as engine, served(engine, folder) as s:
        assert (await answer(s, "/v1/completions", {"prompt": "x" * 507}))[0] == 200
    assert engine.submits[0].sampling_params.max_tokens == 5


async def test_chat_without_a_template_is_unsupported(tmp_path: Path) -> None:
    from gateway_builders import write_model

    bare = write_model(tmp_path / "bare", template=None)
    async with FakeEngine() as engine, served(engine, bare) as s:
        status, body = await answer(s, "/v1/chat/completions", CHAT)
        assert status == 400 and body["error"]["code"] == "unsupported"
        assert "--chat-template" in body["error"]["message"]
        assert (await answer(s, "/v1/completions", TEXT))[0] == 200


async def test_model_defaults_apply_unless_the_request_says_otherwise(tmp_path: Path) -> None:
    from gateway_builders import write_model

    folder = write_model(tmp_path / "cold", temperature=0.0, top_k=7)
    async with FakeEngine() as engine, served(engine, folder) as s:
        await answer(s, "/v1/completions", TEXT)
        await answer(s, "/v1/completions", TEXT | {"temperature": 0.5})
    first, second = (submit.sampling_params for submit in engine.submits)
    assert (first.temperature, first.top_k) == (0.0, 7)
    assert (second.temperature, second.top_k) == (0.5, 7)
