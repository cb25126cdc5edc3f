"""Ask: what one HTTP request wants generated, the same for chat and completions.

`read_ask` reads the fields both have. Knows no tokenizer: prompts are still text here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.errors import InvalidRequest
from quire.sampling import SamplingParams
from quire_gateway.openai.body import Fields, shown
from quire_gateway.text.template import Message

MAX_PRIORITY = (1 << 31) - 1
_GRAMMAR = "structured output comes later; leave it out or ask in the prompt."
# field -> values that change nothing, and what to do about the others
UNSUPPORTED: dict[str, tuple[Sequence[object], str]] = {
    "response_format": (({"type": "text"},), _GRAMMAR),
    "guided_json": ((), _GRAMMAR),
    "guided_regex": ((), _GRAMMAR),
    "guided_choice": ((), _GRAMMAR),
    "guided_grammar": ((), _GRAMMAR),
    "structured_outputs": ((), _GRAMMAR),
    "bad_words": (([],), "use logit_bias."),
    "use_beam_search": ((False,), "use n with a temperature."),
    "prompt_logprobs": ((), "only output tokens have log-probabilities."),
    "truncate_prompt_tokens": ((), "shorten the prompt before sending it."),
    "prompt_embeds": ((), "send text or token ids."),
    "return_token_ids": ((False,), "logprobs carry the tokens' bytes."),
    "return_tokens_as_token_ids": ((False,), "logprobs carry the tokens' bytes."),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: text or token ids."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat before the template has made a prompt of it."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, str | int | float | bool]
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request. params.max_tokens None = what the context leaves."""

    source: tuple[Prompt, ...] | Conversation
    params: SamplingParams
    model: str  # the name answers carry
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    priority: int
    cache_salt: str
    max_tokens_field: str  # for errors: max_tokens or max_completion_tokens
    max_tokens_given: bool  # by the request, not by a default


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the configuration allow."""

    model_names: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    max_prompts: int
    sampling_defaults: dict[str, float]


def read_model(fields: Fields, names: Sequence[str]) -> str:
    """The served name the request asks for; the first one when it does not say.

    Raises 'model_not_found' for a name that is not served.
    """
    model = fields.get("model", names[0])
    if not isinstance(model, str):
        raise InvalidRequest("model must be a string.", "model")
    if model not in names:
        known = ", ".join(names)
        raise InvalidRequest(
            f"The model {shown(model)} does not exist; this server has: {known}.",
            "model",
            "model_not_found",
        )
    return names[0]


def read_stream(fields: Fields) -> tuple[bool, bool, bool]:
    """(stream, include_usage, continuous_usage_stats)."""
    stream = fields.boolean("stream", False)
    options = Fields(fields.mapping("stream_options"))
    if fields.get("stream_options") is not None and not stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true.", "stream_options"
        )
    try:
        include = options.boolean("include_usage", False)
        continuous = options.boolean("continuous_usage_stats", False)
    except InvalidRequest as error:
        raise InvalidRequest(f"stream_options: {error.message}", "stream_options") from None
    return stream, include or continuous, continuous


def refuse_unsupported(fields: Fields, further: dict[str, tuple[Sequence[object], str]]) -> None:
    """Raise 'unsupported' for the first field that asks for what this server can't do."""
    for table in (UNSUPPORTED, further):
        for name, (harmless, why) in table.items():
            fields.refuse(name, harmless, why)


def read_priority(fields: Fields) -> int:
    return fields.integer("priority", 0, -MAX_PRIORITY, MAX_PRIORITY)
