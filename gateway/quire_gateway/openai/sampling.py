"""From a body to SamplingParams, with the model's defaults where the body is silent.

The values are checked by SamplingParams itself, so every protocol refuses the same ones.
Knows neither chat nor completions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequest
from quire.sampling import MAX_LOGIT_BIAS, SamplingParams
from quire_gateway.openai.body import Fields, json_kind, shown

# Passed on as they are; check() names them in its errors.
_PLAIN = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "stop", "stop_token_ids", "seed", "allowed_token_ids",
)  # fmt: skip
_HUGE = 1 << 64
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


def read_sampling(
    fields: Fields,
    defaults: Mapping[str, Any],
    max_tokens_field: str,
    max_tokens: int | None,
    logprobs_field: str,
    logprobs: Any,
    vocab_size: int,
) -> SamplingParams:
    """The request's SamplingParams, checked.

    defaults: the model's (generation_config.json). max_tokens (None = what the context leaves)
    and logprobs (None = off) come from fields that chat and completions name differently; the
    names are for errors.
    """
    values: dict[str, Any] = dict(defaults)
    for name in _PLAIN:
        value = fields.get(name)
        if value is not None:
            values[name] = tuple(value) if isinstance(value, list) else _sane(name, value)
    for name in _SWITCHES:
        values[name] = fields.boolean(name, name == "skip_special_tokens")
    values["max_tokens"] = max_tokens
    values["logprobs"] = logprobs
    values["logit_bias"] = _logit_bias(fields.mapping("logit_bias"))
    try:
        return SamplingParams(**values).check(vocab_size)
    except InvalidRequest as error:
        names = {"max_tokens": max_tokens_field, "logprobs": logprobs_field}
        own = error.param or ""
        param = names.get(own, own)
        message = error.message
        if message.startswith(own):
            message = param + message.removeprefix(own)
        raise InvalidRequest(message, param) from None


def _logit_bias(biases: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(biases)} entries; at most {MAX_LOGIT_BIAS} are taken.",
            "logit_bias",
        )
    pairs = []
    for key, bias in biases.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers; {shown(key)} is no token id.",
                "logit_bias",
            )
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers, not to {json_kind(bias)}.",
                "logit_bias",
            )
        pairs.append((int(key), _sane("logit_bias", bias)))
    return tuple(pairs)


def _sane(name: str, value: Any) -> Any:
    """JSON integers have no bound, but floats do: refuse what can't become one."""
    if isinstance(value, int) and abs(value) > _HUGE:
        raise InvalidRequest(f"{name} is out of range: {shown(value)}.", name)
    return value
