"""Log lines: fields, formats, and nothing forged."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from quire import log


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before[0], before[1]


def lines(format: str, message: str, **extra: object) -> str:
    stream = io.StringIO()
    log.setup("gateway", "info", format, stream)
    logging.getLogger("quire.test").info(message, extra=extra)
    return stream.getvalue()


def test_a_json_line_has_the_fields_of_a_request() -> None:
    line = json.loads(lines("json", "done", request_id="r1", duration_ms=1.5, tokens=7))
    assert line["message"] == "done" and line["level"] == "info" and line["service"] == "gateway"
    assert (line["request_id"], line["duration_ms"], line["tokens"]) == ("r1", 1.5, 7)
    assert line["timestamp"].endswith("Z") and "T" in line["timestamp"]


@pytest.mark.parametrize("format", ["text", "json"])
def test_control_characters_can_not_forge_a_line(format: str) -> None:
    text = lines(format, "a\nb\x1b[31m", request_id="x\r\ny")
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_a_text_line_shows_its_fields() -> None:
    assert "  done  tokens=7" in lines("text", "done", tokens=7)


def test_lines_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    log.setup("gateway", "warning", "text", stream)
    logging.getLogger("quire.test").info("no")
    assert stream.getvalue() == ""


def test_an_exception_is_part_of_its_json_line() -> None:
    stream = io.StringIO()
    log.setup("worker", "info", "json", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("quire.test").exception("failed")
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]
