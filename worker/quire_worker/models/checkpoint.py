"""A folder of safetensors files as a map from tensor names to memory-mapped tensors.

Knows the file format (github.com/huggingface/safetensors: 8 bytes of header length, JSON header,
data) and checks all of it before a byte of data is touched; knows no models. Every defect is a
ModelError that names file and tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire.errors import ModelError

_MAX_HEADER = 100_000_000  # the format's own limit
_INDEX = "model.safetensors.index.json"
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# name in the header -> (bytes per element, torch dtype)
_DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "F64": (8, torch.float64),
    "F32": (4, torch.float32),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2),
    "I64": (8, torch.int64),
    "I32": (4, torch.int32),
    "I16": (2, torch.int16),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    end: int


class Checkpoint:
    """The tensors of a model folder. Opening reads headers only; data is mapped copy-on-write when
    asked for.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """ModelError when files are missing, of an unsafe format, truncated or damaged."""
        self.folder = Path(model_dir)
        self.files = weight_files(self.folder)
        self._maps: dict[Path, np.ndarray] = {}
        self.entries: dict[str, Entry] = {}
        for path in self.files:
            for name, entry in read_header(path)[1].items():
                if name in self.entries:
                    raise ModelError(
                        f"{path}: tensor {name} is also in {self.entries[name].path.name}"
                    )
                self.entries[name] = entry
        self._check_index()

    @property
    def total_bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The mapped tensor, in the file's dtype. ModelError when it is missing, of another shape
        or not floating.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(
                f"{self.folder}: tensor {name} is missing from "
                f"{_list(f.name for f in self.files)}; the checkpoint is "
                "incomplete or its config.json belongs to another model"
            )
        if entry.shape != shape:
            raise ModelError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}, but config.json asks "
                f"for {list(shape)}"
            )
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise ModelError(
                f"{entry.path}: tensor {name} is {_name(entry.dtype)}; quantised weights are not "
                "supported by this version"
            )
        if entry.path not in self._maps:
            self._maps[entry.path] = np.memmap(entry.path, dtype=np.uint8, mode="c")
        data = self._maps[entry.path][entry.begin : entry.end]
        if entry.begin % entry.dtype.itemsize:
            data = np.array(data)  # the format does not promise alignment
        return torch.from_numpy(data).view(entry.dtype).view(entry.shape)

    def _check_index(self) -> None:
        """Every tensor the index promises is in the file it names."""
        path = self.folder / _INDEX
        if len(self.files) < 2 or not path.is_file():
            return
        for name, file in _weight_map(path).items():
            entry = self.entries.get(name)
            if entry is None or entry.path.name != file:
                raise ModelError(
                    f"{self.folder / file}: tensor {name} is missing, though {_INDEX} promises it "
                    "there"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name; ModelError says what is missing."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder; --model must name one with config.json and *.safetensors"
        )
    index = folder / _INDEX
    if index.is_file():
        paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise ModelError(
                f"{folder}: {len(absent)} of {len(paths)} weight files are missing: "
                f"{_list(absent)}; the download may be "
                "incomplete"
            )
        return paths
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(paths) == 1:
        return paths
    if paths:
        raise ModelError(
            f"{folder} has {len(paths)} safetensors files but no {_INDEX}; the download may be "
            "incomplete"
        )
    unsafe = sorted(path.name for pattern in _UNSAFE for path in folder.glob(pattern))
    if unsafe:
        raise ModelError(
            f"{folder} holds weights only as {_list(unsafe)}; such files can run code when loaded "
            "and are refused. "
            "Convert the checkpoint to safetensors, or use a copy that has model.safetensors"
        )
    raise ModelError(f"{folder} has no weights: expected model.safetensors or {_INDEX}")


def read_header(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """The raw header and its tensors, checked: types known, sizes right, data gapless and within
    the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length < 2 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(
                f"{path} is not a complete safetensors file: {size} bytes, header of {length} "
                "bytes; it is truncated or "
                "not a safetensors file (a git-lfs pointer?)"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is damaged (not a JSON object)")
    start = 8 + length
    entries = {
        name: _entry(path, name, value, start)
        for name, value in header.items()
        if name != "__metadata__"
    }
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise ModelError(
                f"{path} is truncated: tensor {name} ends at byte {entry.end}, the file at "
                f"{size}; download it again"
            )
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise ModelError(f"{path}: the header is damaged: tensor {name} {what}")
        at = entry.end
    if at != size:
        raise ModelError(f"{path}: {size - at} bytes follow the last tensor; the file is damaged")
    return raw, entries


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    kind = value.get("dtype") if isinstance(value, dict) else value
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ModelError(f"{path}: tensor {name} has the unknown dtype {kind!r}")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not (
        _naturals(shape) and _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    ):
        raise ModelError(
            f"{path}: the header is damaged: tensor {name} has shape {shape!r}, data_offsets "
            f"{offsets!r}"
        )
    itemsize, dtype = _DTYPES[kind]
    expected, found = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    if expected != found:
        raise ModelError(
            f"{path}: the header is damaged: tensor {name} of shape {shape} needs {expected} "
            f"bytes, but has {found}"
        )
    return Entry(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_bytes())["weight_map"]
        good = all(
            isinstance(name, str) and isinstance(file, str) for name, file in mapping.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good or not mapping:
        raise ModelError(
            f"{index} is damaged: expected an object weight_map of tensor names and files"
        )
    for file in mapping.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index}: weight file {file!r} is not a plain *.safetensors name in the same "
                "folder"
            )
    return mapping


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
