"""Reading one JSON object field by field, so that a missing or wrong value is named in the error.

Knows JSON types, not models.
"""

from __future__ import annotations

import math
from typing import Any

from quire.errors import ModelError

_ABSENT = object()


class Fields:
    """A JSON object and the name by which errors speak of it. Every reader raises ModelError."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.wrong(key, value, f"an integer of at least {low}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= above
        ):
            raise self.wrong(key, value, f"a finite number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def section(self, key: str) -> Fields:
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """An id, a list of ids, or nothing."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise self.wrong(key, value, f"token ids in [0, {vocab_size})")
        return tuple(ids)

    def wrong(self, key: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.where}: {key} is {value!r}, expected {expected}")

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key, _ABSENT)
        if value is not _ABSENT and value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.where}: the field {key} is missing")
        return default
