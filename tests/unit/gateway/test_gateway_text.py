"""Tokenizers, incremental text and stop strings: the pieces equal the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from gateway_builders import IM_END, byte_backend, sentencepiece_backend, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ModelError
from quire.sampling import SamplingParams
from quire_gateway.text.detokenizer import detokenizer
from quire_gateway.text.generation import GenerationDefaults
from quire_gateway.text.stop import StopMatcher
from quire_gateway.text.stream import TextStream
from quire_gateway.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_backend(), {})
PIECES = Tokenizer(sentencepiece_backend(), {})
quick = settings(max_examples=100, deadline=None)


def text_bytes(text: str) -> list[int]:
    return list(text.encode())


# -- detokenizer
@quick
@given(st.text(max_size=12).map(text_bytes), st.data())
def test_valid_text_never_shows_a_hole(ids: list[int], data: st.DataObject) -> None:
    stream = detokenizer(BYTES)
    shown = ""
    for token_id in ids:
        piece = stream.push(token_id)
        assert "\ufffd" not in piece or "\ufffd" in bytes(ids).decode()
        shown += piece
        assert bytes(ids).decode().startswith(shown)
    assert shown + stream.flush() == bytes(ids).decode()


@quick
@given(st.lists(st.integers(0, 258), max_size=20), st.booleans())
def test_byte_pieces_equal_full_decode(ids: list[int], skip: bool) -> None:
    stream = detokenizer(BYTES, (), skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == BYTES.decode(ids, skip)


@quick
@given(st.lists(st.integers(0, PIECES.vocab_size - 1), max_size=20), st.booleans())
def test_window_pieces_equal_full_decode(ids: list[int], skip: bool) -> None:
    stream = detokenizer(PIECES, (), skip)
    shown, whole = "".join(map(stream.push, ids)) + stream.flush(), PIECES.decode(ids, skip)
    # A broken run of <0x..> tokens decodes to one hole a byte, even over bytes that were a
    # character before the run broke; what is out can't be taken back.
    assert shown == whole or "\ufffd" in whole


@quick
@given(st.lists(st.integers(259, 265), min_size=1, max_size=80), st.integers(0, 79))
def test_window_pieces_continue_the_prompt(ids: list[int], cut: int) -> None:
    cut = min(cut, len(ids))
    stream = detokenizer(PIECES, ids[:cut])
    shown = "".join(map(stream.push, ids[cut:])) + stream.flush()
    assert PIECES.decode(ids[:cut]) + shown == PIECES.decode(ids) or cut == 0


def test_leading_space_after_a_prompt_is_kept() -> None:
    hello, world = PIECES.token_id("\u2581Hello"), PIECES.token_id("\u2581world")
    assert hello is not None and world is not None
    assert detokenizer(PIECES, [hello]).push(world) == " world"
    assert detokenizer(PIECES).push(hello) == "Hello"


def test_character_begun_in_the_prompt_is_finished() -> None:
    first, *rest = "€".encode()
    stream = detokenizer(BYTES, [65, first])
    assert [stream.push(byte) for byte in rest] == ["", "€"]


def test_cut_character_becomes_a_hole_at_the_end_only() -> None:
    stream = detokenizer(BYTES)
    assert [stream.push(byte) for byte in "a😀".encode()[:-1]] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"


def test_endless_broken_bytes_are_shown_after_a_while() -> None:
    stream = detokenizer(PIECES)
    shown = "".join(stream.push(3 + 0xE2) for _ in range(100))
    assert 60 < len(shown) <= 100


# -- stop strings
def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string complete first, the longest of those, cuts the text."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


words = st.text("ab\n", max_size=14)
stops = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


@quick
@given(words, stops, st.lists(st.integers(0, 14), max_size=6))
def test_stop_does_not_depend_on_the_split(text: str, stop: list[str], cuts: list[int]) -> None:
    places = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    matcher = StopMatcher(stop)
    shown = ""
    for begin, end in zip(places, places[1:], strict=False):
        shown += matcher.push(text[begin:end])
        assert expected(text, stop)[0].startswith(shown)  # never more than is certain
    shown += matcher.flush()
    assert (shown, matcher.matched) == expected(text, stop)


def test_every_split_of_a_stop_string() -> None:
    text, stop = "the answer<|end|> is", "<|end|>"
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            matcher = StopMatcher([stop])
            parts = (text[:first], text[first:second], text[second:])
            assert "".join(map(matcher.push, parts)) == "the answer"
            assert matcher.matched == stop and matcher.flush() == ""


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a#") == "a"
    assert matcher.push("b##") == "#b"
    assert matcher.flush() == "##"


def test_stop_string_is_shown_on_request() -> None:
    matcher = StopMatcher(["bc"], include_stop_str_in_output=True)
    assert matcher.push("ab") + matcher.push("cd") == "abc"


def test_long_hostile_stop_strings_stay_linear() -> None:
    import time

    matcher = StopMatcher(["a" * 255 + "b"] * 16)
    begin = time.process_time()
    for _ in range(200):
        matcher.push("a" * 10)
    assert time.process_time() - begin < 2


# -- text stream
def stream_of(ids: list[int], split: int = 1, **params: object) -> tuple[str, TextStream]:
    stream = TextStream(BYTES, SamplingParams(**params))  # type: ignore[arg-type]
    stopped = ids[-1] == IM_END
    shown = ""
    for begin in range(0, len(ids), split):
        last = begin + split >= len(ids)
        shown += stream.push(ids[begin : begin + split], last, last and stopped)
    return shown, stream


@pytest.mark.parametrize("split", [1, 2, 5, 100])
def test_tokens_are_counted_up_to_the_stop(split: int) -> None:
    shown, stream = stream_of(text_bytes("one two three"), split, stop="two")
    assert (shown, stream.stop_string, stream.num_tokens) == ("one ", "two", 7)


def test_stop_token_is_not_shown() -> None:
    assert stream_of([*b"hi", IM_END], skip_special_tokens=False)[0] == "hi"
    shown, stream = stream_of(
        [*b"hi", IM_END], skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert shown == "hi<|im_end|>" and stream.num_tokens == 3


def test_stop_strings_wait_for_min_tokens() -> None:
    assert stream_of(text_bytes("ab ab"), stop="ab", min_tokens=3)[0] == "ab "


@quick
@given(st.text("abc€é", min_size=1, max_size=10), st.integers(1, 5), stops)
def test_stream_does_not_depend_on_the_split(text: str, split: int, stop: list[str]) -> None:
    ids = text_bytes(text)
    whole, one = stream_of(ids, len(ids), stop=stop)
    parts, many = stream_of(ids, split, stop=stop)
    assert (whole, one.num_tokens) == (parts, many.num_tokens) and whole == expected(text, stop)[0]


# -- tokenizer
def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("x" * 100)) == 100


def test_special_tokens_come_from_the_config(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|endoftext|>"},
                "eos_token": "<|new|>",
                "added_tokens_decoder": {"259": {"content": "<|new|>", "special": True}, "x": 1},
            }
        )
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|new|>"}
    assert tokenizer.encode("a<|new|>") == [97, 259] and tokenizer.vocab_size == 260
    assert tokenizer.decode([97, 259]) == "a"
    assert tokenizer.decode([97, 259], skip_special_tokens=False) == "a<|new|>"


def test_bos_comes_from_the_post_processor(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_token_bytes() -> None:
    assert [BYTES.token_bytes(i) for i in (0xC3, 0x20, 256, 9999)] == [
        b"\xc3", b" ", b"<|endoftext|>", b"",
    ]  # fmt: skip
    hello = PIECES.token_id("\u2581Hello")
    assert hello and PIECES.token_bytes(hello) == b" Hello"
    assert PIECES.token_bytes(3 + 0xE2) == b"\xe2"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no tokenizer.json"), ("{", "can't be read")]
)
def test_damaged_tokenizer_is_a_model_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(tmp_path)


# -- generation defaults
def test_generation_config_gives_defaults(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path, temperature=0.7, top_k=20, do_sample=False, max_new_tokens=3, eos_token_id=[1, 2]
    )
    defaults = GenerationDefaults.from_folder(folder)
    assert defaults.sampling == {"temperature": 0.7, "top_k": 20}
    assert defaults.eos_token_ids == (1, 2)
    assert GenerationDefaults.from_folder(folder, "none").sampling == {}


def test_bad_generation_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"top_p must be.*--generation-config none"):
        GenerationDefaults.from_folder(write_model(tmp_path, top_p=7))
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        GenerationDefaults.from_folder(tmp_path)
