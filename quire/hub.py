"""Where a model's files are: the embedded demo, a local folder, or the hub's cache.

Imports huggingface_hub only when a hub id must be looked up.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from quire.errors import ModelError

EMBEDDED = ("demo", "demo-draft")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja"]


def embedded_dir(name: str) -> Path:
    """The folder of an embedded model, in a checkout or in an installed wheel."""
    here = Path(__file__).resolve().parent
    for root in (here.parent / "models", here / "models"):
        if (root / name / "config.json").is_file():
            return root / name
    raise ModelError(f"the embedded model {name!r} is missing from this installation; reinstall.")


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder that holds `model` (config.json, *.safetensors, tokenizer.json).

    `model` is 'demo', a folder, or a hub id 'owner/name' (HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE are honoured). Raises ModelError that says what was tried.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():  # '' would be the current folder
        return _checked(path.resolve())
    if model in EMBEDDED:
        return embedded_dir(model)
    if path.is_file():
        raise ModelError(
            f"{model} is a file; give the folder that holds config.json and *.safetensors."
        )
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        near = difflib.get_close_matches(model, EMBEDDED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"no model at {model!r}: not a folder, not an embedded model "
            f"({', '.join(EMBEDDED)}), not a hub id (owner/name).{hint} Check the path."
        )
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:  # what is cached needs no network
        return _checked(
            Path(snapshot_download(model, revision=revision, local_files_only=True)), partial=True
        )
    except (OSError, ValueError, ModelError):
        pass
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ModelError(
            f"{model!r} is not in the local cache and HF_HUB_OFFLINE is set; unset it, "
            "or give a local folder."
        )
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=_FILES, etag_timeout=5, max_workers=4
        )
    except Exception as error:  # the hub's error family is wide and changes
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model!r} is neither a folder nor in the local cache, and the hub could not give "
            f"it ({first[:200]}). Check the name and the network, or give a local folder."
        ) from error
    return _checked(Path(folder))


def _checked(folder: Path, partial: bool = False) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json; give a folder in Hugging Face layout "
            "(config.json, tokenizer.json, *.safetensors)."
        )
    if partial and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors")
    return folder


def resolve_tokenizer(tokenizer: str, folder: Path) -> Path:
    """The folder of --tokenizer, or the model's own."""
    if not tokenizer:
        return folder
    path = Path(tokenizer).expanduser()
    path = path.parent if path.name == "tokenizer.json" else path
    if not path.is_dir():
        raise ModelError(f"--tokenizer {tokenizer} is not a folder that holds tokenizer.json.")
    return path
