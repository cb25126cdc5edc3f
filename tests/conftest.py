"""Shared test set-up: marked tests that need more than this machine are left out."""

from __future__ import annotations

import os

import pytest

# Before torch is imported: several test processes share the cores, and OpenMP teams that spin
# while one of their threads is preempted stall each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its lines about lost peers are no failures

OFF_BY_DEFAULT = ("model", "soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("-m") or ""
    for item in items:
        for name in OFF_BY_DEFAULT:
            if item.get_closest_marker(name) and name not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"marked {name}: run with -m {name}"))
