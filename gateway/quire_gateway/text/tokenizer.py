"""Tokenizer: text <-> token ids, from a model folder's tokenizer.json.

Knows no model and no chat; needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from quire.errors import ModelError

# The names transformers gives to a chat template.
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                   "mask_token")  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One tokenizer.json. Thread-safe; encoding releases the interpreter lock, so a caller on
    an event loop hands long texts to a thread."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = special_tokens  # "bos_token" -> "<s>", for chat templates
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.is_byte_level = _is_byte_level(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, and the names of special tokens from tokenizer_config.json.

        Raises ModelError that names the file and the cause.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} holds no tokenizer.json; save the tokenizer with "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, or give --tokenizer."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{path} can't be read: {error}") from None
        config = read_json(folder / "tokenizer_config.json")
        names = _special_names(config, read_json(folder / "special_tokens_map.json"))
        _add_missing(backend, config, names)
        return cls(backend, names)

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1, added tokens included."""
        added = self.backend.get_added_tokens_decoder()
        return max(self.backend.get_vocab_size(), max(added, default=-1) + 1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. add_special_tokens applies the tokenizer's own post-processor
        (a leading BOS, where the model wants one)."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that do not exist are skipped."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token's content, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, perhaps a part of a character; b"" when there is no
        such token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._to_bytes(token)
        return known

    def _to_bytes(self, token: str) -> bytes:
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF[c] for c in token)
            except KeyError:
                return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; {} when there is no such file. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _content(value: object) -> str | None:
    """A special token stands as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special_names(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, str]:
    names = {}
    for name in TEMPLATE_TOKENS:
        content = _content(config.get(name)) or _content(legacy.get(name))
        if content:
            names[name] = content
    return names


def _add_missing(
    backend: tokenizers.Tokenizer, config: dict[str, Any], names: dict[str, str]
) -> None:
    """Give the backend the special tokens that only tokenizer_config.json knows, as
    transformers does: those of added_tokens_decoder, and bos, eos ... as special."""
    added = backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    decoder = config.get("added_tokens_decoder")
    entries = decoder if isinstance(decoder, dict) else {}
    numbered = {int(key): entry for key, entry in entries.items() if key.isdecimal()}
    for key, entry in sorted(numbered.items()):
        content = _content(entry)
        if content is None or backend.token_to_id(content) is not None:
            continue
        if backend.get_vocab_size() != key:  # it would get another id than the file says
            continue
        flags = {f: bool(entry.get(f)) for f in ("single_word", "lstrip", "rstrip", "normalized")}
        token = tokenizers.AddedToken(content, special=bool(entry.get("special")), **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    for content in names.values():
        if content not in special and backend.token_to_id(content) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(content, normalized=False)])


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether decoding is "each character of a token is one byte, joined as UTF-8"."""
    if backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(0x100 + k): byte for k, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_alphabet()
