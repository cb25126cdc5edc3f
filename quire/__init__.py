"""Quire: LLM inference from paged KV memory, as a set of small services.

`from quire import LLM, SamplingParams` is the Python API; `quire serve` the services.
Names are loaded when they are first used, so that importing quire costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quire.version import __version__

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.errors import QuireError
    from quire.llm import LLM, LLMEngine
    from quire.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
    from quire.sampling import SamplingParams

_HOMES = {
    "LLM": "quire.llm",
    "LLMEngine": "quire.llm",
    "EngineConfig": "quire.config",
    "SamplingParams": "quire.sampling",
    "RequestOutput": "quire.outputs",
    "CompletionOutput": "quire.outputs",
    "EmbeddingRequestOutput": "quire.outputs",
    "QuireError": "quire.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "LLMEngine",
    "QuireError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
