"""Model folders of a few bytes: whole, or damaged in one way."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 512}


def folder(path: Path, config: dict[str, Any] | None = None, **tensors: list[int]) -> Path:
    """A folder that passes the checks; tensors: name -> shape, stored as bfloat16 zeros."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "tokenizer.json").write_text("{}")
    weights(path / "model.safetensors", tensors or {"w": [4, 8]})
    return path


def weights(path: Path, tensors: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> None:
    """A safetensors file of zeros."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
