"""The error table and what an error becomes."""

from __future__ import annotations

import grpc
import pytest

from quire.errors import (
    KINDS,
    AddressInUse,
    ConfigError,
    InvalidRequest,
    ModelError,
    QuireError,
    ResourceError,
)


def test_every_kind_can_be_translated_at_every_edge() -> None:
    for name, kind in KINDS.items():
        assert 400 <= kind.status <= 599, name
        assert hasattr(grpc.StatusCode, kind.grpc), name
        assert 0 < kind.exit_status < 128, name
        assert kind.type.endswith("_error"), name


def test_what_may_be_tried_again_is_the_servers_fault() -> None:
    assert all(kind.status in (408, 429, 503) for kind in KINDS.values() if kind.retry)


def test_the_openai_body_has_all_four_keys() -> None:
    body = InvalidRequest("n must be 1.", "n").to_openai()
    assert body == {
        "error": {
            "message": "n must be 1.",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }


@pytest.mark.parametrize(
    ("error", "label", "status"),
    [
        (ConfigError("x."), "Configuration error: x.", 2),
        (ModelError("x."), "Model error: x.", 2),
        (ResourceError("x."), "Resource error: x.", 2),
        (AddressInUse("x."), "Address already in use: x.", 98),
    ],
)
def test_startup_errors_say_their_kind(error, label: str, status: int) -> None:
    assert str(error) == label
    assert error.kind.exit_status == status


def test_a_name_outside_the_table_can_not_be_raised() -> None:
    with pytest.raises(KeyError):
        QuireError("oops", "x")
