"""ChatTemplate: messages -> the prompt text the model was trained on.

Finds the model's jinja2 template and renders it in a sandbox (see sandbox.py). Knows no HTTP;
messages are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from quire.errors import InvalidRequest, ModelError
from quire_gateway.text.sandbox import Budget, budget, sandbox
from quire_gateway.text.tokenizer import Tokenizer, read_json

MAX_TEMPLATE_BYTES = 1 << 20

Message = dict[str, Any]
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "quire probe"


class ChatTemplate:
    """A compiled chat template. `render` may run in any thread."""

    def __init__(self, source: str, special_tokens: dict[str, str], origin: str = "template"):
        try:
            self._template = sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{origin}, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise ModelError(f"{origin} is no chat template that can be used: {error}") from None
        self._special_tokens = special_tokens
        self._wants_parts = self._probe()

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, override: str = ""
    ) -> ChatTemplate | None:
        """The template of a model: the file `override`, else chat_template.jinja, else
        tokenizer_config.json's chat_template (its 'default' when there are several). None
        when the model has none. Raises ModelError."""
        source, origin = _find(folder, override)
        return None if source is None else cls(source, tokenizer.special_tokens, origin)

    def _probe(self) -> bool:
        """Whether the template wants content as a list of parts: it shows a list's text, but
        not a string's."""
        content: str | list[dict[str, str]]
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                if _PROBE in self._run([{"role": "user", "content": content}], True, {}):
                    return isinstance(content, list)
            except (InvalidRequest, jinja2.TemplateError):
                continue
        return False

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt. Each message has role and content (a string, or a list of
        {"type": "text", "text": ...}); kwargs are further variables of the template.

        Raises InvalidRequest with what the template said when it refuses the messages.
        """
        flat = [self._shaped(message) for message in messages]
        if continue_final_message:
            return self._continued(flat, kwargs or {})
        return self._run(flat, add_generation_prompt, kwargs or {})

    def _shaped(self, message: Message) -> Message:
        """The message with its content in the shape the template wants."""
        content = message.get("content")
        if isinstance(content, str) and self._wants_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self._wants_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return dict(message)

    def _continued(self, messages: list[Message], kwargs: dict[str, Any]) -> str:
        """The prompt that ends inside the last message, found by a tag as transformers does."""
        last = messages[-1]
        if isinstance(last["content"], list):
            *others, part = last["content"]
            last["content"] = [*others, {**part, "text": part["text"] + _TAG}]
        else:
            last["content"] = last["content"] + _TAG
        text = self._run(messages, False, kwargs)
        place = text.rfind(_TAG.strip())
        if place < 0:
            raise InvalidRequest(
                "continue_final_message: the chat template does not show the final message.",
                "continue_final_message",
            )
        whole = text[place : place + len(_TAG)] == _TAG
        return text[:place] if whole else text[:place].rstrip()

    def _run(self, messages: list[Message], add_prompt: bool, kwargs: dict[str, Any]) -> str:
        values = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **kwargs,
            "messages": messages,
            "add_generation_prompt": add_prompt,
        }
        token = budget.set(Budget())
        try:
            return self._template.render(values)
        except InvalidRequest:
            raise
        except Exception as error:  # whatever the template's code does with these messages
            reason = str(error)[:500] or type(error).__name__
            raise InvalidRequest(
                f"The chat template refused the messages: {reason}", "messages"
            ) from None
        finally:
            budget.reset(token)


def _find(folder: Path, override: str) -> tuple[str | None, str]:
    for path in [Path(override)] if override else [folder / "chat_template.jinja"]:
        if override or path.is_file():
            try:
                if path.stat().st_size > MAX_TEMPLATE_BYTES:
                    raise ModelError(f"{path} is larger than {MAX_TEMPLATE_BYTES} bytes.")
                return path.read_text(encoding="utf-8"), str(path)
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"{path} can't be read: {error}") from None
    path = folder / "tokenizer_config.json"
    value = read_json(path).get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path}: chat_template must be a string or a list of named templates.")
    return value or None, f"{path}: chat_template"
