"""Shared test set-up: marked tests that need more than this machine are left out."""

from __future__ import annotations

import pytest

OFF_BY_DEFAULT = ("model", "soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("-m") or ""
    for item in items:
        for name in OFF_BY_DEFAULT:
            if item.get_closest_marker(name) and name not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"marked {name}: run with -m {name}"))
