"""/v1/chat/completions: from its body to an Ask.

Knows no template and no tokenizer: messages stay messages here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quire.errors import InvalidRequest
from quire.sampling import MAX_LOGPROBS
from quire_gateway.openai.ask import (
    Ask,
    Conversation,
    Limits,
    read_model,
    read_priority,
    read_stream,
    refuse_unsupported,
)
from quire_gateway.openai.body import Fields, json_kind, shown
from quire_gateway.openai.sampling import read_sampling
from quire_gateway.text.template import Message

MAX_MESSAGES = 8192
MAX_PARTS = 1024
MAX_KWARGS = 32
MAX_KWARG_CHARS = 4096
ROLES = ("system", "developer", "user", "assistant")
_TOOLS = "tool calls come later."
UNSUPPORTED: dict[str, tuple[Sequence[object], str]] = {
    "tools": (([],), _TOOLS),
    "functions": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "modalities": ((["text"], []), "answers are text."),
    "audio": ((), "answers are text."),
    "web_search_options": ((), "this server opens no connections."),
    "documents": (([],), "put them into a message."),
    "chat_template": ((), "a server's template is set with --chat-template."),
    "best_of": ((1,), "every choice is returned; use n."),
    "echo": ((False,), "use /v1/completions."),
}
# Variables of the template that a request may not set: they are the messages' own.
_RESERVED = re.compile(
    r"messages|tools|documents|add_generation_prompt|continue_final_message|tokenize|.*_token"
)


def read_chat(body: dict[str, Any], limits: Limits) -> Ask:
    """The Ask in a chat body. Raises InvalidRequest."""
    fields = Fields(body)
    model = read_model(fields, limits.model_names)
    refuse_unsupported(fields, UNSUPPORTED)
    stream, include_usage, continuous = read_stream(fields)
    newer = fields.get("max_completion_tokens") is not None
    max_tokens_field = "max_completion_tokens" if newer else "max_tokens"
    params = read_sampling(
        fields, limits.sampling_defaults, max_tokens_field, fields.get(max_tokens_field),
        "top_logprobs", _logprobs(fields), limits.vocab_size,
    )  # fmt: skip
    return Ask(
        source=_conversation(fields),
        params=params,
        model=model,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        echo=False,
        priority=read_priority(fields),
        cache_salt=fields.string("cache_salt"),
        max_tokens_field=max_tokens_field,
        max_tokens_given=fields.get(max_tokens_field) is not None,
    )


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    if fields.get("top_logprobs") is None:
        return 0 if wanted else None
    count = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    if not wanted:
        if count == 0:
            return None
        raise InvalidRequest("top_logprobs needs logprobs: true.", "top_logprobs")
    return count


def _conversation(fields: Fields) -> Conversation:
    value = fields.get("messages")
    if not isinstance(value, list):
        raise InvalidRequest(f"messages must be a list, not {json_kind(value)}.", "messages")
    if not value:
        raise InvalidRequest("messages must not be empty.", "messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages has {len(value)} entries; at most {MAX_MESSAGES} are taken.", "messages"
        )
    messages = tuple(_message(item, k) for k, item in enumerate(value))
    goes_on = fields.boolean("continue_final_message", False)
    add_prompt = fields.boolean("add_generation_prompt", not goes_on)
    if goes_on and add_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt can't both be true.",
            "continue_final_message",
        )
    return Conversation(
        messages,
        add_prompt,
        goes_on,
        _template_kwargs(fields.mapping("chat_template_kwargs")),
        fields.boolean("add_special_tokens", False),
    )


def _message(item: Any, k: int) -> Message:
    where = f"messages[{k}]"
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object, not {json_kind(item)}.", "messages")
    role = item.get("role")
    if role in ("tool", "function") or item.get("tool_calls") or item.get("function_call"):
        raise InvalidRequest(f"{where}: {_TOOLS}", "messages", "unsupported")
    if role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, not {shown(role)}.", "messages"
        )
    message: Message = {
        # templates know the older name of the same role
        "role": "system" if role == "developer" else role,
        "content": _content(item.get("content"), where),
    }
    for name in ("name", "reasoning_content"):
        if item.get(name) is not None:
            if not isinstance(item[name], str):
                raise InvalidRequest(f"{where}.{name} must be a string.", "messages")
            message[name] = item[name]
    return message


def _content(value: Any, where: str) -> str | list[dict[str, str]]:
    """A string, or a list of text parts as {"type": "text", "text": ...}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(
            f"{where}.content must be a string or a list of parts, not {json_kind(value)}.",
            "messages",
        )
    if not 1 <= len(value) <= MAX_PARTS:
        raise InvalidRequest(
            f"{where}.content has {len(value)} parts; 1 to {MAX_PARTS} are taken.", "messages"
        )
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"{where}.content: each part needs a type.", "messages")
        if kind != "text":
            raise InvalidRequest(
                f"{where}.content: parts of type {shown(kind)} are not supported, only text.",
                "messages",
                "unsupported",
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.content: a text part needs a text.", "messages")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _template_kwargs(values: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Scalars under plain names only: a template's variables are no way in."""
    name = "chat_template_kwargs"
    if len(values) > MAX_KWARGS:
        raise InvalidRequest(
            f"{name} has {len(values)} entries; at most {MAX_KWARGS} are taken.", name
        )
    for key, value in values.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", key) or _RESERVED.fullmatch(key):
            raise InvalidRequest(f"{name} can't set {shown(key)}.", name)
        if not isinstance(value, (str, int, float, bool)):
            raise InvalidRequest(
                f"{name}.{key} must be a string, a number or a boolean, not {json_kind(value)}.",
                name,
            )
        if isinstance(value, str) and len(value) > MAX_KWARG_CHARS:
            raise InvalidRequest(f"{name}.{key} is longer than {MAX_KWARG_CHARS} characters.", name)
    return dict(values)
