"""Shapes: the JSON of answers, chunks, usage and log-probabilities.

Chat and completions differ in a few keys; those are in two small classes with one interface.
Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from quire_gateway.logprobs import TokenLogprobs
from quire_gateway.text.tokenizer import Tokenizer

Json = dict[str, Any]
_LOWEST = -9999.0  # stands for minus infinity, which JSON does not have
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True)
class Usage:
    """Token counts of a whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Finished:
    """One choice, complete."""

    index: int
    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    text_offset: int = 0  # where the output begins in text, with echo


class Shape(Protocol):
    """The JSON of one endpoint."""

    id_prefix: str
    object: str
    chunk_object: str

    def start(self, index: int) -> Json | None:
        """The first chunk's choice, before any text; None when there is no such chunk."""

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None, offset: int
    ) -> Json:
        """A chunk's choice. offset: characters of the choice sent before."""

    def end(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Json:
        """The last chunk's choice."""

    def whole(self, choice: Finished, with_logprobs: bool) -> Json:
        """A choice of an answer that is not streamed."""


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def start(self, index: int) -> Json | None:
        return _choice(index, "delta", {"role": "assistant", "content": ""}, None, None)

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None, offset: int
    ) -> Json:
        shown = None if logprobs is None else self._logprobs(logprobs)
        return _choice(index, "delta", {"content": text}, shown, None)

    def end(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Json:
        return _choice(index, "delta", {}, None, finish_reason) | {"stop_reason": stop_reason}

    def whole(self, choice: Finished, with_logprobs: bool) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        shown = self._logprobs(choice.logprobs) if with_logprobs else None
        return _choice(choice.index, "message", message, shown, choice.finish_reason) | {
            "stop_reason": choice.stop_reason
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json:
        content = []
        for token in tokens:
            entries = [
                self._entry(i, p) for i, p in zip(token.token_ids, token.logprobs, strict=True)
            ]
            content.append({**entries[0], "top_logprobs": entries[1:]})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": finite(logprob),
            "bytes": list(data),
        }


class CompletionShape:
    """text_completion, streamed or not."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def start(self, index: int) -> Json | None:
        return None

    def delta(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs] | None, offset: int
    ) -> Json:
        shown = None if logprobs is None else self._logprobs(logprobs, offset)
        return _choice(index, "text", text, shown, None)

    def end(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Json:
        return _choice(index, "text", "", None, finish_reason) | {"stop_reason": stop_reason}

    def whole(self, choice: Finished, with_logprobs: bool) -> Json:
        shown = self._logprobs(choice.logprobs, choice.text_offset) if with_logprobs else None
        return _choice(choice.index, "text", choice.text, shown, choice.finish_reason) | {
            "stop_reason": choice.stop_reason
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> Json:
        texts: list[str] = []
        tops: list[dict[str, float]] | None = []
        offsets = []
        for token in tokens:
            names = [
                self._tokenizer.token_bytes(i).decode("utf-8", "replace") for i in token.token_ids
            ]
            offsets.append(offset)
            offset += len(names[0])
            texts.append(names[0])
            if len(names) == 1:
                tops = None
            elif tops is not None:
                top: dict[str, float] = {}
                for name, logprob in zip(names, token.logprobs, strict=True):
                    top.setdefault(name, finite(logprob))  # two tokens may read the same
                tops.append(top)
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprobs[0]) for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _choice(
    index: int, key: str, value: object, logprobs: Json | None, finish_reason: str | None
) -> Json:
    return {"index": index, key: value, "logprobs": logprobs, "finish_reason": finish_reason}


def finite(logprob: float) -> float:
    """A number JSON can carry: minus infinity and NaN become -9999."""
    return logprob if logprob > _LOWEST else _LOWEST
