"""Looking over a model folder before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from quire.cli.checkpoint import inspect
from quire.errors import ModelError
from unit.quire import checkpoints


def test_counts_parameters_from_the_headers(tmp_path: Path) -> None:
    found = inspect(checkpoints.folder(tmp_path, a=[4, 8], b=[3]))
    assert (found.num_parameters, found.num_bytes) == (35, 70)
    assert (found.dtype, found.architecture) == ("bfloat16", "Qwen3ForCausalLM")
    assert found.loaded_bytes("float32") == 140
    assert found.loaded_bytes("auto") == 70


def test_counts_all_shards(tmp_path: Path) -> None:
    checkpoints.folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("a", "b"):
        checkpoints.weights(tmp_path / f"{name}.safetensors", {name: [10]})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect(tmp_path).num_parameters == 20
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        inspect(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _no_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 8) + b"not json")


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _outside(path: Path) -> None:
    head = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [1 << 40, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)


def _odd(path: Path) -> None:
    head = json.dumps({"w": [1, 2], "v": None}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)


@pytest.mark.parametrize("damage", [_cut, _no_header, _huge_header, _empty, _outside, _odd])
def test_damaged_weights_are_named(tmp_path: Path, damage) -> None:
    checkpoints.folder(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        inspect(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_files_that_are_no_json_are_named(tmp_path: Path, name: str) -> None:
    checkpoints.folder(tmp_path)
    (tmp_path / name).write_bytes(b"\xff{")
    with pytest.raises(ModelError, match=name):
        inspect(tmp_path)


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    checkpoints.folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer.json.*--tokenizer"):
        inspect(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    checkpoints.folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        inspect(tmp_path)


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": "x"}])
def test_a_config_without_architecture_is_refused(tmp_path: Path, config: dict) -> None:
    with pytest.raises(ModelError, match="names no architecture"):
        inspect(checkpoints.folder(tmp_path, config))
