"""/v1/completions: from its body to an Ask.

Knows no tokenizer and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.errors import InvalidRequest
from quire_gateway.openai.ask import (
    Ask,
    Limits,
    Prompt,
    read_model,
    read_priority,
    read_stream,
    refuse_unsupported,
)
from quire_gateway.openai.body import Fields, json_kind, shown
from quire_gateway.openai.sampling import read_sampling

DEFAULT_MAX_TOKENS = 16
UNSUPPORTED: dict[str, tuple[Sequence[object], str]] = {
    "suffix": (("",), "text is only written after the prompt."),
}


def read_completion(body: dict[str, Any], limits: Limits) -> Ask:
    """The Ask in a completions body. Raises InvalidRequest."""
    fields = Fields(body)
    model = read_model(fields, limits.model_names)
    refuse_unsupported(fields, UNSUPPORTED)
    stream, include_usage, continuous = read_stream(fields)
    logprobs = fields.get("logprobs")
    params = read_sampling(
        fields, limits.sampling_defaults, "max_tokens",
        fields.get("max_tokens", DEFAULT_MAX_TOKENS), "logprobs", logprobs, limits.vocab_size,
    )  # fmt: skip
    fields.refuse("best_of", (params.n,), "every choice is returned; use n.")
    echo = fields.boolean("echo", False)
    if echo and logprobs is not None:
        raise InvalidRequest(
            "echo with logprobs is not supported: prompt tokens have no log-probabilities here.",
            "echo",
            "unsupported",
        )
    special = fields.boolean("add_special_tokens", True)
    return Ask(
        source=read_prompts(fields.get("prompt"), limits, special),
        params=params,
        model=model,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        echo=echo,
        priority=read_priority(fields),
        cache_salt=fields.string("cache_salt"),
        max_tokens_field="max_tokens",
        max_tokens_given=fields.get("max_tokens") is not None,
    )


def read_prompts(value: Any, limits: Limits, add_special_tokens: bool) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return (_text(value, add_special_tokens),)
    if not isinstance(value, list):
        raise InvalidRequest(
            f"prompt must be a string, a list of strings or token ids, not {json_kind(value)}.",
            "prompt",
        )
    if not value:
        raise InvalidRequest("prompt must not be empty.", "prompt")
    if type(value[0]) is int:
        return (_ids(value, limits),)
    if len(value) > limits.max_prompts:
        raise InvalidRequest(
            f"prompt has {len(value)} entries; at most {limits.max_prompts} are taken.", "prompt"
        )
    if all(isinstance(item, str) for item in value):
        return tuple(_text(item, add_special_tokens) for item in value)
    if all(isinstance(item, list) for item in value):
        return tuple(_ids(item, limits) for item in value)
    raise InvalidRequest(
        "prompt must hold only strings, only token ids, or only lists of token ids.", "prompt"
    )


def _text(text: str, add_special_tokens: bool) -> Prompt:
    if not text:
        raise InvalidRequest("prompt must not be empty.", "prompt")
    return Prompt(text=text, add_special_tokens=add_special_tokens)


def _ids(token_ids: list[Any], limits: Limits) -> Prompt:
    if not token_ids:
        raise InvalidRequest("prompt must not be empty.", "prompt")
    if set(map(type, token_ids)) != {int}:
        raise InvalidRequest("prompt must hold only token ids in this list.", "prompt")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= limits.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            f"prompt must hold token ids between 0 and {limits.vocab_size - 1}, "
            f"not {shown(wrong)}.",
            "prompt",
        )
    return Prompt(token_ids=tuple(token_ids))
