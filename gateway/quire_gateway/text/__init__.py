"""Text: tokenizers, incremental text, stop strings, chat templates.

Imports no web framework and no gRPC, so that the in-process API uses it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire_gateway.text.generation import GenerationDefaults
from quire_gateway.text.stream import TextStream
from quire_gateway.text.template import ChatTemplate
from quire_gateway.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "GenerationDefaults", "TextModel", "TextStream", "Tokenizer", "load"]


@dataclass(frozen=True)
class TextModel:
    """All that a model folder says about text."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has no chat template
    defaults: GenerationDefaults


def load(
    folder: Path,
    tokenizer_folder: Path | None = None,
    chat_template: str = "",
    generation_config: str = "auto",
) -> TextModel:
    """Read a model folder. tokenizer_folder: another folder's tokenizer; chat_template: a file
    with a template that goes before the model's. Raises ModelError."""
    text_folder = tokenizer_folder or folder
    tokenizer = Tokenizer.from_folder(text_folder)
    return TextModel(
        tokenizer,
        ChatTemplate.from_folder(text_folder, tokenizer, chat_template),
        GenerationDefaults.from_folder(folder, generation_config),
    )
