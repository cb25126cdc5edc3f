"""Builders for the gateway's tests: a tiny tokenizer, a model folder, a served gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import tokenizers
from aiohttp import web
from tokenizers import decoders, models, pre_tokenizers

from fakes.engine_server import FakeEngine
from quire.config import EngineConfig
from quire_gateway import text
from quire_gateway.app import RUNNER_OPTIONS, build
from quire_gateway.state import Gateway
from quire_gateway.text.tokenizer import _BYTE_OF

END, IM_START, IM_END = 256, 257, 258
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_backend() -> tokenizers.Tokenizer:
    """Token id = byte value; three special tokens after them."""
    vocab = dict(_BYTE_OF)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """A small tokenizer of the older kind: spaces as U+2581, bytes as <0x..> fall-back."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["\u2581", "\u2581Hello", "\u2581world", "a", "b", "lo", "\u2581a"]
    vocab = [(word, -float(k)) for k, word in enumerate(words)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def write_model(folder: Path, template: str | None = CHATML, **generation: Any) -> Path:
    """A model folder as far as the gateway reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_backend().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}})
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@dataclass
class Served:
    """A gateway that answers at `url`."""

    gateway: Gateway
    app: web.Application
    url: str
    http: aiohttp.ClientSession

    def gateway_routes(self) -> list[str]:
        """Every path the app knows, as it is registered."""
        return sorted({r.canonical for r in self.app.router.resources()})

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        """(status, JSON body, headers)"""
        async with self.http.post(self.url + path, json=body, **kwargs) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any, Any]:
        async with self.http.get(self.url + path, **kwargs) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text, response.headers

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The stream, cut at blank lines."""
        async with self.http.post(self.url + path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            content = await response.text()
        assert content.endswith("\n\n")
        return content.removesuffix("\n\n").split("\n\n")

    async def chunks(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The JSON of each event of a stream that ends well."""
        events = await self.events(path, body)
        assert events[-1] == "data: [DONE]"
        return [json.loads(e.removeprefix("data: ")) for e in events[:-1] if e.startswith("data")]


@contextlib.asynccontextmanager
async def served(
    engine: FakeEngine | None, folder: Path, *, wait: bool = True, **settings: Any
) -> AsyncIterator[Served]:
    """A gateway over real sockets, in front of a fake engine."""
    address = engine.address if engine else "127.0.0.1:1"
    config = EngineConfig(
        **{"model": "fake", "engine_address": address, "reconnect_timeout": 5.0, **settings}
    )
    gateway = Gateway(config, text.load(folder))
    app = build(gateway)
    runner = web.AppRunner(app, **RUNNER_OPTIONS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as http:
            result = Served(gateway, app, f"http://127.0.0.1:{port}", http)
            if wait:
                await until(lambda: gateway.engine.connected)
            yield result
    finally:
        await runner.cleanup()


async def until(condition: Any, timeout: float = 10.0) -> None:
    """Wait for a condition nobody announces."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
