"""Where a model's files are found, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire import hub
from quire.errors import ModelError


def test_the_embedded_model_is_found_by_name() -> None:
    assert (hub.resolve("demo") / "config.json").is_file()


def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("demo") == tmp_path / "demo"


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        hub.resolve(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        hub.resolve(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("model", ["/nope", "./nope", "~/nope/never", "a b", "", "x/y/z"])
def test_what_can_not_be_a_hub_id_is_not_looked_up(model: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        hub.resolve(model)


def test_near_names_are_suggested() -> None:
    with pytest.raises(ModelError, match="Did you mean 'demo'"):
        hub.resolve("dmo")


def test_offline_a_hub_id_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        hub.resolve("nobody/no-such-model")
