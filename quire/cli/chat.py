"""`quire chat`: a conversation at the terminal, streamed; in this process or with a server.

Knows the Python API (no --url) and one HTTP route (--url); keeps the conversation itself.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from quire.cli.generate import sampling
from quire.cli.options import Line
from quire.config import Resolved
from quire.errors import ConfigError, QuireError

Message = dict[str, str]
ENDS = ("/quit", "quit", "/exit", "exit")


class Backend(Protocol):
    """Who answers."""

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The answer's text, piece by piece. Raises QuireError."""

    def close(self) -> None:
        """Let go of what was opened."""


def run(line: Line, resolved: Resolved) -> int:
    """Talk until /quit or the end of stdin; the exit status."""
    given = sampling(line)
    url = line.option("url")
    backend: Backend
    if url:
        backend = Server(url, resolved, given)
    else:
        print(f"Loading {resolved.config.model_names[0]} ...", file=sys.stderr, flush=True)
        backend = Local(resolved, given)
    start = [{"role": "system", "content": line.option("system")}] if line.option("system") else []
    try:
        converse(backend, start, sys.stdin.isatty())
    finally:
        backend.close()
    return 0


def converse(backend: Backend, start: list[Message], interactive: bool) -> None:
    """Read a line, stream the answer, and so on. Old turns go when the context is full."""
    if interactive:
        print("Type a message; /new forgets the conversation, /quit ends.")
    messages = list(start)
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("That was not valid UTF-8; it is left out.", file=sys.stderr)
            continue
        if text in ENDS:
            return
        if text == "/new":
            messages = list(start)
            continue
        if text:
            messages.append({"role": "user", "content": text})
            messages = _turn(backend, messages, len(start))


def _turn(backend: Backend, messages: list[Message], kept: int) -> list[Message]:
    """Stream one answer; the conversation with it, or without the question when it failed."""
    parts: list[str] = []
    while True:
        try:
            for part in backend.answer(messages):
                parts.append(part)
                print(part, end="", flush=True)
        except KeyboardInterrupt:
            pass  # what has been said stays
        except QuireError as error:
            if error.name == "context_length_exceeded" and len(messages) > kept + 1:
                print("(the conversation is too long; its oldest turn is forgotten)")
                messages = messages[:kept] + messages[kept + 2 :]
                continue
            print(f"{'' if not parts else chr(10)}Error: {error.message}", file=sys.stderr)
            return messages[:-1]
        print()
        return [*messages, {"role": "assistant", "content": "".join(parts)}]


class Local:
    """An engine in this process."""

    def __init__(self, resolved: Resolved, given: dict[str, Any]) -> None:
        from quire.llm import LLMEngine

        self._engine = LLMEngine(resolved.config)
        self._params = replace(self._engine.get_default_sampling_params(), **given)
        self._runner = asyncio.Runner()

    def answer(self, messages: list[Message]) -> Iterator[str]:
        stream = self._engine.chat_stream(messages, self._params)
        said = 0

        async def more() -> str | None:
            nonlocal said
            async for output in stream:
                text = output.outputs[0].text
                fresh, said = text[said:], len(text)
                return fresh
            return None

        async def close() -> None:
            await stream.aclose()  # type: ignore[attr-defined]

        try:
            while (piece := self._runner.run(more())) is not None:
                yield piece
        finally:
            self._runner.run(close())

    def close(self) -> None:
        self._runner.close()
        self._engine.shutdown()


class Server:
    """A running server, by its OpenAI route."""

    def __init__(self, url: str, resolved: Resolved, given: dict[str, Any]) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r}: expected something like http://127.0.0.1:8000.")
        self._parts = parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = next(iter(resolved.config.api_key), "")
        self._fields = given
        named = not resolved.is_default("model") or not resolved.is_default("served_model_name")
        self._model = resolved.config.model_names[0] if named else self._first_model()

    def answer(self, messages: list[Message]) -> Iterator[str]:
        body = {"model": self._model, "messages": messages, "stream": True, **self._fields}
        connection, response = self._send("POST", "/v1/chat/completions", body)
        try:
            for raw in response:
                if not raw.startswith(b"data: ") or raw.strip() == b"data: [DONE]":
                    continue
                event = json.loads(raw[6:])
                if "error" in event:
                    raise _error(event)
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""
        finally:
            response.close()  # its own, where the server closes after each answer
            connection.close()

    def close(self) -> None:
        """Nothing stays open between answers."""

    def _first_model(self) -> str:
        connection, response = self._send("GET", "/v1/models", None)
        with closing(connection):
            models = json.loads(response.read()).get("data") or [{}]
        return str(models[0].get("id", "default"))

    def _send(
        self, method: str, path: str, body: object
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=300
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=300)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._base + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise QuireError(
                "not_ready", f"no answer from {self._parts.geturl()}: {error}; is it running?"
            ) from None
        if response.status != 200:
            text = response.read()
            connection.close()
            try:
                raise _error(json.loads(text))
            except ValueError:
                raise QuireError(
                    "internal_error", f"{self._parts.geturl()} answered {response.status}."
                ) from None
        return connection, response


def _error(body: Any) -> QuireError:
    found = body.get("error") if isinstance(body, dict) else None
    if not isinstance(found, dict):
        raise ValueError("no error object")
    name = "context_length_exceeded"
    if found.get("code") != name:
        name = "internal_error"
    return QuireError(name, str(found.get("message")))
