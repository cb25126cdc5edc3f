"""Detokenizer: text of tokens that arrive one by one, with no half characters.

The pieces put together equal the decoding of the whole, however the tokens arrive. Knows
no stop strings (see stop.py) and no requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from quire_gateway.text.tokenizer import Tokenizer

_HOLE = "\ufffd"
_CONTEXT = 6  # prompt tokens that decide how the first output token reads
_WINDOW = 32  # tokens decoded again per step, at most about this many
_MAX_HELD = 64  # tokens of broken text held back before they are shown as they are


class Detokenizer(Protocol):
    """Text of one output sequence. Two kinds, by how the tokenizer decodes."""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token: "" while a character is incomplete."""

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD. Nothing may be pushed after it."""


def detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> Detokenizer:
    """A Detokenizer for the output that follows prompt_token_ids, so that leading spaces and
    a character begun in the prompt come out right."""
    kind = ByteDetokenizer if tokenizer.is_byte_level else WindowDetokenizer
    return kind(tokenizer, prompt_token_ids, skip_special_tokens)


class ByteDetokenizer:
    """For byte-level tokenizers: each token is some bytes, the bytes are UTF-8."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_token_ids[-_CONTEXT:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDetokenizer:
    """For every other tokenizer: decodes a short window of tokens again and shows what is new.

    `_ids` begins at a place where the text was certain; `_shown` is its text that is out.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_token_ids[-_CONTEXT:])
        self._shown = self._decode().rstrip(_HOLE)
        self._certain = len(self._ids)  # tokens whose text is out
        self._held = 0

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(_HOLE) and self._held < _MAX_HELD:
            self._held += 1
            return ""
        self._held = 0
        piece = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) > _WINDOW:
            del self._ids[: self._certain]
            self._shown = self._decode()
        self._certain = len(self._ids)
        return piece

    def flush(self) -> str:
        return self._decode()[len(self._shown) :]
