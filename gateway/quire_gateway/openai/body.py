"""Bodies: strict JSON, and fields read one by one with clear errors.

null means absent everywhere, unknown fields are left alone. Knows no field's meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from quire.errors import InvalidRequest

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises InvalidRequest 'invalid_json' for everything
    that is not exactly that: bad UTF-8, NaN, numbers of thousands of digits, deep nesting,
    half surrogate pairs."""
    if not body.strip():
        raise _invalid("The body is empty; send a JSON object.")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not UTF-8: byte {error.start} can't be decoded.") from None
    except RecursionError:
        raise _invalid("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not valid JSON: {error}.") from None
    except ValueError:  # Python's own limit, 4300 digits
        raise _invalid("The body holds a number of thousands of digits.") from None
    if not isinstance(value, dict):
        raise _invalid(f"The body must be a JSON object, not {json_kind(value)}.")
    if _SURROGATE.search(body):
        _refuse_surrogates(value)
    return value


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, name="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise _invalid(f"The body is not valid JSON: {name} is no JSON number.")


def _refuse_surrogates(value: object) -> None:
    """An escape such as \\ud83d alone is no character and can't be encoded."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise _invalid("The body holds half a surrogate pair (\\ud800-\\udfff).") from None


def json_kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def shown(value: object) -> str:
    """A value from outside, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


class Fields:
    """A body's fields. Each reader raises InvalidRequest naming the field."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; the default when it is absent or null."""
        value = self.body.get(name)
        return default if value is None else value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be a boolean, not {json_kind(value)}.", name)
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name} must be an integer, not {json_kind(value)}.", name)
        if not low <= value <= high:
            raise InvalidRequest(
                f"{name} must be between {low} and {high}, not {shown(value)}.", name
            )
        return value

    def string(self, name: str, default: str = "", size: int = 256) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a string, not {json_kind(value)}.", name)
        if len(value.encode()) > size:
            raise InvalidRequest(f"{name} is longer than {size} bytes.", name)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name} must be an object, not {json_kind(value)}.", name)
        return value

    def refuse(self, name: str, harmless: Sequence[Any], why: str) -> None:
        """Raise 'unsupported' when the field asks for something that would change the answer,
        that is, when its value is none of the harmless ones."""
        value = self.get(name)
        if value is None or any(value == h and type(value) is type(h) for h in harmless):
            return
        raise InvalidRequest(f"{name} is not supported: {why}", name, "unsupported")
