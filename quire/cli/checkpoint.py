"""What a model folder holds, read from its small files and the headers of its weights.

Finds damage before anything is loaded. Imports no tensor library and reads no weight.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire import hub
from quire.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that looks whole. num_bytes: of the weights as they are stored."""

    folder: Path
    architectures: tuple[str, ...]
    dtype: str  # what most of the weights are stored in
    num_parameters: int
    num_bytes: int
    max_model_len: int  # 0 = config.json does not say

    @property
    def architecture(self) -> str:
        return self.architectures[0]

    def loaded_bytes(self, dtype: str) -> int:
        """Bytes of the weights when loaded as `dtype`; 'auto' = as stored."""
        return self.num_parameters * WIDTH.get(dtype, 0) or self.num_bytes


def inspect(folder: Path, tokenizer: str = "") -> Checkpoint:
    """Look a folder over. Raises ModelError that names the file and what is wrong with it."""
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelError(
            f"{folder / 'config.json'} names no architecture; it needs a key "
            '"architectures" such as ["LlamaForCausalLM"].'
        )
    where = hub.resolve_tokenizer(tokenizer, folder)
    if not (where / "tokenizer.json").is_file():
        raise ModelError(
            f"{where} holds no tokenizer.json; save the model's fast tokenizer there, "
            "or name a folder that has one with --tokenizer."
        )
    read_json(where / "tokenizer.json")
    counts: dict[str, int] = {}
    for path in _weight_files(folder):
        for dtype, count in _tensors(path):
            counts[dtype] = counts.get(dtype, 0) + count
    most = max(counts, key=lambda d: counts[d] * BYTES[d])
    length = config.get("max_position_embeddings")
    return Checkpoint(
        folder=folder,
        architectures=tuple(map(str, architectures)),
        dtype=DTYPES.get(most, most.lower()),
        num_parameters=sum(counts.values()),
        num_bytes=sum(count * BYTES[dtype] for dtype, count in counts.items()),
        max_model_len=length if isinstance(length, int) else 0,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON: {str(error)[:120]}. Fetch the file again."
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f'{index} has no "weight_map".')
        paths = [folder / str(name) for name in sorted(set(map(str, names.values())))]
        for path in paths:
            if not path.is_file():
                raise ModelError(f"{path} is missing, but {index.name} names it.")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} holds no *.safetensors file; other formats are not read.")
    return paths


def _tensors(path: Path) -> list[tuple[str, int]]:
    """(dtype, number of elements) of each tensor of a safetensors file, bounds checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, size - 8):
                raise ModelError(
                    f"{path} is damaged or cut off: its header is too long. Fetch it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelError(
            f"{path} is damaged: its header is not valid JSON. Fetch it again."
        ) from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its header is not a JSON object. Fetch it again.")
    found = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
            count = math.prod(shape)
            whole = 0 <= begin <= end <= size - 8 - length and end - begin == count * BYTES[dtype]
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ModelError(
                f"{path} is damaged or cut off: tensor {name[:80]!r} does not fit the file. "
                "Fetch the file again."
            )
        found.append((dtype, count))
    if not found:
        raise ModelError(f"{path} holds no tensors.")
    return found
