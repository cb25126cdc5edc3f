"""The long forms of benchmarks/chaos.py: the counts and times that docs/recovery.md promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest_plugins = ["flow.conftest"]

FORMS = [
    ("worker", "--kills", "30"),
    ("scheduler", "--kills", "15"),
    ("both", "--kills", "10"),
    ("poison",),
    ("freeze",),
    ("freeze", "--apart"),
    ("slow",),
    ("drain",),
    ("cancel",),
    ("flat",),
]


@pytest.mark.soak
@pytest.mark.parametrize("words", FORMS, ids=" ".join)
def test_promises_are_kept(chaos: Callable[..., dict[str, Any]], words: tuple[str, ...]) -> None:
    print(chaos(*words, slack=1.0, timeout_s=3600))
