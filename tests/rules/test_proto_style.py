"""The style of protos/: the essentials of `buf lint` STANDARD, checked without buf."""

from __future__ import annotations

import re

import pytest

from rules.sources import ROOT

PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*")
UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def bare(path) -> str:
    """The file without comments."""
    return re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.name)
def test_package_stands_in_its_folder(path) -> None:
    package = re.search(r"^package ([a-z0-9.]+);", bare(path), re.MULTILINE)
    assert package and package[1].replace(".", "/") == str(path.parent.relative_to(ROOT / "protos"))
    assert re.fullmatch(r".*\.v\d+", package[1])
    assert SNAKE.fullmatch(path.stem)


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.name)
def test_messages_and_fields_are_named_by_the_rules(path) -> None:
    text = bare(path)
    names = re.findall(r"^\s*message (\w+)", text, re.MULTILINE)
    assert names == [n for n in names if PASCAL.fullmatch(n)]
    fields = re.findall(r"^\s*(?:optional |repeated )?[\w.]+ (\w+) = \d+", text, re.MULTILINE)
    fields = [f for f in fields if not f.isupper()]
    wrong = [f for f in fields if not SNAKE.fullmatch(f)]
    assert not wrong


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.name)
def test_enum_values_carry_their_enum_and_start_unspecified(path) -> None:
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", bare(path), re.DOTALL):
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper() + "_"
        values = re.findall(r"(\w+) = (\d+)", body)
        assert values[0] == (f"{prefix}UNSPECIFIED", "0")
        assert all(v.startswith(prefix) and UPPER.fullmatch(v) for v, _ in values)


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.name)
def test_calls_have_a_request_and_a_response_of_their_own(path) -> None:
    text = bare(path)
    assert all(s.endswith("Service") for s in re.findall(r"^service (\w+)", text, re.MULTILINE))
    seen: list[str] = []
    for call, asks, answers in re.findall(
        r"rpc (\w+)\((?:stream )?(\w+)\) returns \((?:stream )?(\w+)\)", text
    ):
        assert (asks, answers) == (f"{call}Request", f"{call}Response")
        seen += [asks, answers]
    assert len(seen) == len(set(seen))
