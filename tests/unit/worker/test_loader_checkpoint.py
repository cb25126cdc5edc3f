"""Damaged, incomplete and foreign checkpoints are refused by name; digests follow content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes.checkpoints import make_checkpoint
from quire.errors import ModelError
from quire_worker.loader import load_model, model_digest
from quire_worker.models.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder, device=CPU)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def change_header(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def test_tensors_equal_those_safetensors_reads(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name, expected in load_file(folder / "model.safetensors").items():
        assert torch.equal(checkpoint.tensor(name, tuple(expected.shape)), expected)
    assert checkpoint.total_bytes == sum(e.end - e.begin for e in checkpoint.entries.values())


def test_unaligned_data_is_read(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")["model.norm.weight"].clone()
    for extra in ("a", "ab", "abc", "abcd"):  # JSON headers of every length modulo 4
        change_header(folder, lambda header, extra=extra: header.update(__metadata__={"x": extra}))
        assert torch.equal(Checkpoint(folder).tensor("model.norm.weight", (64,)), expected)


def test_progress_counts_every_byte_once(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, device=CPU, progress=lambda done, total: seen.append((done, total)))
    total = Checkpoint(folder).total_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_dtype_is_the_checkpoints_unless_told(tmp_path: Path) -> None:
    half = make_checkpoint(tmp_path / "half", "llama", dtype="float16")
    assert load_model(half, device=CPU).dtype == torch.bfloat16
    assert load_model(half, device=CPU, dtype="float16").dtype == torch.float16
    brain = make_checkpoint(tmp_path / "brain", "llama", dtype="bfloat16")
    assert load_model(brain, device=CPU).dtype == torch.bfloat16
    assert load_model(brain, device=CPU, dtype="float32").dtype == torch.float32
    with pytest.raises(ModelError, match="int4"):
        load_model(brain, device=CPU, dtype="int4")
    config = json.loads((brain / "config.json").read_text())
    del config["dtype"]
    (brain / "config.json").write_text(json.dumps(config))
    assert load_model(brain, device=CPU).dtype == torch.bfloat16


def test_truncated_files_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    refused(folder, "model.safetensors", "truncated", "tensor")
    path.write_bytes(data[:50])
    refused(folder, "model.safetensors", "not a complete safetensors file")
    path.write_bytes(b"")
    refused(folder, "model.safetensors", "0 bytes")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(folder, "git-lfs")
    path.write_bytes(data + b"more")
    refused(folder, "4 bytes follow")


NAME = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[NAME].update(dtype="F7"), [NAME, "F7"]),
        (lambda h: h[NAME].update(dtype=["F32"]), [NAME, "dtype"]),
        (lambda h: h.update({NAME: 5}), [NAME, "dtype"]),
        (lambda h: h[NAME].update(shape=[65]), [NAME, "260 bytes", "256"]),
        (lambda h: h[NAME].update(shape=[-64]), [NAME, "-64"]),
        (lambda h: h[NAME].update(shape="64"), [NAME, "shape"]),
        (lambda h: h[NAME].update(data_offsets=[0]), [NAME, "data_offsets"]),
        (lambda h: h[NAME].update(data_offsets=[10**12, 10**12 + 256]), [NAME, "ends at byte"]),
        (lambda h: h[NAME].update(data_offsets=[0, 256]), ["overlaps"]),
        (lambda h: h.pop("model.layers.0.mlp.up_proj.weight"), ["gap"]),
    ],
)
def test_damaged_headers_are_refused(folder: Path, change, words: list[str]) -> None:
    change_header(folder, change)
    refused(folder, "model.safetensors", *words)


def test_a_header_that_is_not_json_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[10] = 0xFF
    path.write_bytes(bytes(data))
    refused(folder, "header is damaged")


def test_missing_misshapen_and_surplus_tensors_are_refused(folder: Path) -> None:
    kept = folder / "model.safetensors"
    backup = kept.read_bytes()
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "model.layers.1.mlp.up_proj.weight", "missing", "model.safetensors")
    kept.write_bytes(backup)
    change_tensors(folder, lambda t: t.update({NAME: torch.zeros(63)}))
    refused(folder, NAME, "[63]", "[64]")
    change_tensors(folder, lambda t: t.update({NAME: torch.zeros(64, dtype=torch.int8)}))
    refused(folder, NAME, "int8", "quantised")
    kept.write_bytes(backup)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    change_tensors(folder, lambda t: t.update(bias))
    refused(folder, "q_proj.bias", "no place")
    kept.write_bytes(backup)
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    change_tensors(folder, lambda t: t.update(ignored))
    load_model(folder, device=CPU)


def test_unsafe_formats_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    refused(folder, "pytorch_model.bin", "safetensors", "run code")


def test_incomplete_and_hostile_indexes_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", sharded=True)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    second = folder / "model-00002-of-00002.safetensors"
    parked = second.rename(folder / "parked")
    refused(folder, "1 of 2 weight files are missing", second.name)
    parked.rename(second)
    bad = json.loads(index.read_text())
    bad["weight_map"][NAME] = "../model.safetensors"
    index.write_text(json.dumps(bad))
    refused(folder, "../model.safetensors", "plain")
    index.write_text("{}")
    refused(folder, "weight_map")
    good["weight_map"]["model.extra"] = second.name
    index.write_text(json.dumps(good))
    refused(folder, "model.extra", "promises")
    index.unlink()
    refused(folder, "2 safetensors files but no")


def test_digest_follows_content_and_not_the_path(folder: Path, made: Path, tmp_path: Path) -> None:
    digest = model_digest(made)
    assert len(digest) == 16
    assert model_digest(folder) == digest
    other = make_checkpoint(tmp_path / "other", "llama", seed=1)
    assert model_digest(other) != digest
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert model_digest(folder) != digest
    shutil.copy(made / "model.safetensors", path)
    assert model_digest(folder) == digest
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert model_digest(folder) != digest


def test_the_tokenizer_of_the_fake_reads_back(made: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    text = "The margin is wide — naïve? 一二三 🙂\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < 512 and tokenizer.get_vocab_size() == 512
    assert len(ids) < len(text.encode())
    assert tokenizer.encode("<|im_start|>").ids == [509]
