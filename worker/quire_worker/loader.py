"""From a checkpoint folder to a model that can run, and to the digest that names it.

Knows files and devices, not steps. Weights are safetensors by mmap; nothing here can run code from
a checkpoint (no pickle, no auto_map). Every defect is a ModelError naming the file and what to do.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from quire.errors import ModelError
from quire_worker.models.assemble import Progress, assemble
from quire_worker.models.checkpoint import Checkpoint, read_header, weight_files
from quire_worker.models.config import DecoderConfig, read_config
from quire_worker.models.decoder import Decoder

log = logging.getLogger("quire.worker")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WINDOW = 64 << 10  # bytes of each sample of the weights
_WINDOWS = 16  # samples per file, spread evenly, the first and last bytes among them


def load_model(
    model_dir: str | Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress | None = None,
    config: DecoderConfig | None = None,
    block_size: int = 16,
) -> Decoder:
    """Load a checkpoint onto `device`; on a CPU prove row invariance on its shapes.

    dtype: auto | float32 | bfloat16 | float16. auto is the checkpoint's own, except that a CPU runs
    float16 checkpoints in bfloat16 (few CPUs compute float16). `block_size` only tells the proof
    which attention tiles will be used. Raises ModelError.
    """
    config = config or read_config(model_dir)
    checkpoint = Checkpoint(model_dir)
    model = assemble(
        config, checkpoint, device, resolve_dtype(dtype, config, checkpoint, device), progress
    )
    if device.type == "cpu":
        _prove(model, block_size)
    return model


def resolve_dtype(
    name: str, config: DecoderConfig, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype:
    """The dtype of weights and activations. ModelError for an unknown name."""
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f"--dtype {name} is unknown; choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    chosen = config.dtype
    if not chosen:
        stored = {entry.dtype for entry in checkpoint.entries.values()}
        chosen = next((known for known, dtype in DTYPES.items() if dtype in stored), "float32")
    if chosen == "float16" and device.type == "cpu":
        log.info(
            "the checkpoint is float16; on CPU it runs as bfloat16 (--dtype float32 keeps every "
            "bit of the weights)"
        )
        chosen = "bfloat16"
    return DTYPES[chosen]


def model_digest(model_dir: str | Path) -> bytes:
    """16 bytes (BLAKE2b-128) that name a model's content: F3 of the design.

    Covers config.json, every safetensors header, sampled 64 KiB windows of the weights and the
    quantisation arguments (none in this version). Never a path or a file name, and never a full
    read, so a copy elsewhere has the same digest.
    """
    folder = Path(model_dir)
    digest = hashlib.blake2b(digest_size=16, person=b"quire-model-1")
    try:
        _add(digest, (folder / "config.json").read_bytes())
    except OSError as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error.strerror}") from None
    for path in weight_files(folder):
        header, _ = read_header(path)
        _add(digest, header)
        size = path.stat().st_size
        start = 8 + len(header)
        with path.open("rb") as file:
            room = max(size - start - _WINDOW, 0)
            for at in sorted({start + room * i // (_WINDOWS - 1) for i in range(_WINDOWS)}):
                file.seek(at)
                _add(digest, file.read(_WINDOW))
    _add(digest, b"")  # quantisation arguments
    return digest.digest()


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Length first, so that no two different sequences of parts hash the same bytes."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _prove(model: Decoder, block_size: int) -> None:
    from quire_kernels.cpu import invariance

    linears: list[Any] = [model.lm_head]
    for layer in model.layers:
        linears += (layer.qkv, layer.o, layer.gate_up, layer.down)
    config = model.config
    outcome = invariance.prove(
        linears,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        dtype=model.dtype,
    )
    model.tiling, model.numerics = outcome.tiling, outcome.name
    log.debug("row invariance: %s (%s)", outcome.name, outcome.detail)
    if outcome.name.endswith("unproven"):
        log.warning("rows may depend on the batch on this machine: %s", outcome.name)
