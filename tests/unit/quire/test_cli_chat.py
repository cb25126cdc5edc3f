"""The chat's turns and its HTTP side, with a scripted backend and a scripted server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quire.cli import chat
from quire.config import resolve
from quire.errors import QuireError


class Script:
    """Answers from a list; an exception in it is raised."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.heard: list[list[dict]] = []

    def answer(self, messages: list[dict]) -> Iterator[str]:
        self.heard.append(list(messages))
        for part in self.answers.pop(0):  # type: ignore[attr-defined]
            if isinstance(part, Exception):
                raise part
            yield part

    def close(self) -> None: ...


def talk(monkeypatch: pytest.MonkeyPatch, backend: Script, *lines: str) -> None:
    typed = iter(lines)

    def typing(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typing)
    chat.converse(backend, [{"role": "system", "content": "S"}], False)


def roles(messages: list[dict]) -> str:
    return "".join(m["role"][0] for m in messages)


def test_a_conversation_grows_and_streams(monkeypatch, capsys) -> None:
    backend = Script(["Hel", "lo"], ["Bye"])
    talk(monkeypatch, backend, "hi", "", "and?", "/quit", "never")
    assert [roles(m) for m in backend.heard] == ["su", "suau"]
    assert backend.heard[1][2]["content"] == "Hello"
    assert "Hello\nBye\n" in capsys.readouterr().out


def test_new_forgets_all_but_the_system_message(monkeypatch) -> None:
    backend = Script(["a"], ["b"])
    talk(monkeypatch, backend, "one", "/new", "two", "quit")
    assert [roles(m) for m in backend.heard] == ["su", "su"]


def test_a_full_context_drops_the_oldest_turn(monkeypatch, capsys) -> None:
    full = QuireError("context_length_exceeded", "too long")
    backend = Script(["a"], [full], ["b"])
    talk(monkeypatch, backend, "one", "two")
    assert [roles(m) for m in backend.heard] == ["su", "suau", "su"]
    assert backend.heard[-1][1]["content"] == "two"
    assert "oldest turn is forgotten" in capsys.readouterr().out


def test_an_error_is_told_and_the_question_taken_back(monkeypatch, capsys) -> None:
    backend = Script([QuireError("queue_full", "come back later")], ["fine"])
    talk(monkeypatch, backend, "one", "two")
    assert roles(backend.heard[1]) == "su"
    assert "come back later" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    seen: list[dict] = []

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "first"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "key": self.headers.get("Authorization")})
        if body["messages"][-1]["content"] == "refuse":
            error = {"message": "no room", "code": "context_length_exceeded"}
            return self._send(400, json.dumps({"error": error}).encode())
        events = [{"choices": [{"delta": {"content": part}}]} for part in ("a", "b")]
        if body["messages"][-1]["content"] == "break":
            events.append({"error": {"message": "worker lost", "code": "worker_lost"}})
        text = ": keep-alive\n\n" + "".join(f"data: {json.dumps(e)}\n\n" for e in events)
        return self._send(200, (text + "data: [DONE]\n\n").encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    Handler.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(server: chat.Server, text: str) -> str:
    return "".join(server.answer([{"role": "user", "content": text}]))


def test_a_server_is_asked_for_its_model_and_streams(url: str) -> None:
    server = chat.Server(f"{url}/v1/", resolve({"api_key": "k"}, {}), {"max_tokens": 5})
    assert ask(server, "hi") == "ab"
    (request,) = Handler.seen
    assert (request["model"], request["max_tokens"], request["stream"]) == ("first", 5, True)
    assert request["key"] == "Bearer k"


def test_a_named_model_is_asked_for(url: str) -> None:
    server = chat.Server(url, resolve({"model": "mine"}, {}), {})
    ask(server, "hi")
    assert Handler.seen[0]["model"] == "mine"


@pytest.mark.parametrize(
    ("text", "name"), [("refuse", "context_length_exceeded"), ("break", "internal_error")]
)
def test_a_servers_error_keeps_its_words(url: str, text: str, name: str) -> None:
    server = chat.Server(url, resolve({}, {}), {})
    with pytest.raises(QuireError) as caught:
        ask(server, text)
    assert caught.value.name == name
    assert caught.value.message in ("no room", "worker lost")


def test_nobody_there_is_said(url: str) -> None:
    with pytest.raises(QuireError, match="is it running"):
        chat.Server("http://127.0.0.1:1", resolve({}, {}), {})
