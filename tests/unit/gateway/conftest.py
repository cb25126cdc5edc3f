"""Fixtures of the gateway's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from gateway_builders import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the byte tokenizer and a ChatML template."""
    return write_model(tmp_path_factory.mktemp("model") / "fake")
