"""Which function describes which architecture: a lazy table.

Knows names only; a description's module is imported when a checkpoint asks for it. To add a model,
add a row here and a function `Fields -> DecoderConfig` (see `families.py`); other packages add
theirs through the entry point group `quire.models` (name = architecture, value =
"module:function").
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from quire.errors import ModelError

if TYPE_CHECKING:
    from quire_worker.models.config import DecoderConfig
    from quire_worker.models.fields import Fields

    Describe = Callable[[Fields], DecoderConfig]

ENTRY_POINT_GROUP = "quire.models"

# architecture in config.json -> (module, function)
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("quire_worker.models.families", "llama"),
    "MistralForCausalLM": ("quire_worker.models.families", "mistral"),
    "Qwen2ForCausalLM": ("quire_worker.models.families", "qwen2"),
    "Qwen3ForCausalLM": ("quire_worker.models.families", "qwen3"),
}


def describe_function(names: list[str], where: str) -> Describe:
    """The description of the first known of `names`; ModelError lists what is supported."""
    for name in names:
        if name in ARCHITECTURES:
            module, function = ARCHITECTURES[name]
            return getattr(importlib.import_module(module), function)
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    for name in names:
        if name in plugins:
            return plugins[name].load()
    known = ", ".join(sorted({*ARCHITECTURES, *plugins}))
    raise ModelError(
        f"{where}: unknown architecture {', '.join(names)}; supported: {known}. "
        "Serve one of these, or install a package that adds it."
    )
