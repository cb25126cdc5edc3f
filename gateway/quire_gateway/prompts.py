"""From an Ask to prompts as token ids that fit the context.

Renders the chat template, encodes (long texts in a thread), and decides max_tokens. Knows no
engine and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from quire.errors import InvalidRequest
from quire.sampling import SamplingParams
from quire_gateway.openai.ask import Ask, Conversation
from quire_gateway.text import TextModel

INLINE_CHARS = 4096  # a longer text is rendered and encoded off the event loop


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One prompt, ready to submit. params has its final max_tokens and a seed."""

    token_ids: list[int]
    params: SamplingParams
    echo: str  # what the answer's text begins with


async def tokenise(
    ask: Ask, text: TextModel, max_model_len: int, threads: Executor
) -> list[Tokenised]:
    """The prompts of an Ask. Raises InvalidRequest when one does not fit."""
    if isinstance(ask.source, Conversation):
        prompts = [await _chat_ids(ask.source, text, threads)]
        field = "messages"
    else:
        prompts = []
        field = "prompt"
        for prompt in ask.source:
            if prompt.token_ids is not None:
                prompts.append(list(prompt.token_ids))
                continue
            encode = partial(text.tokenizer.encode, prompt.text, prompt.add_special_tokens)
            prompts.append(await _off_loop(encode, len(prompt.text), threads))
    params = ask.params.seeded()
    tokenised = []
    for k, token_ids in enumerate(prompts):
        if not token_ids:
            raise InvalidRequest(f"{field} is empty: it makes no token.", field)
        fitted = fit(params, len(token_ids), max_model_len, field, ask)
        echo = ""
        if ask.echo and not isinstance(ask.source, Conversation):
            source = ask.source[k]
            ids = source.token_ids
            echo = source.text if ids is None else text.tokenizer.decode(ids, False)
        tokenised.append(Tokenised(token_ids, fitted, echo))
    return tokenised


async def _chat_ids(chat: Conversation, text: TextModel, threads: Executor) -> list[int]:
    template = text.template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE.",
            "messages",
            "unsupported",
        )

    def work() -> list[int]:
        prompt = template.render(
            chat.messages,
            chat.add_generation_prompt,
            chat.continue_final_message,
            dict(chat.template_kwargs),
        )
        return text.tokenizer.encode(prompt, chat.add_special_tokens)

    size = sum(_length(m["content"]) for m in chat.messages) + 64 * len(chat.messages)
    return await _off_loop(work, size, threads)


def _length(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(p["text"]) for p in content)


async def _off_loop(work: Callable[[], list[int]], size: int, threads: Executor) -> list[int]:
    if size <= INLINE_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def fit(
    params: SamplingParams, num_prompt_tokens: int, max_model_len: int, field: str, ask: Ask
) -> SamplingParams:
    """params with max_tokens decided. Raises 'context_length_exceeded' with the numbers."""
    room = max_model_len - num_prompt_tokens
    wanted = params.max_tokens
    limit = f"This model's maximum context length is {max_model_len} tokens."
    if room <= 0:
        raise InvalidRequest(
            f"{limit} The {field} has {num_prompt_tokens} tokens, which leaves none for the "
            "answer; shorten it.",
            field,
            "context_length_exceeded",
        )
    if wanted is None or (wanted > room and not ask.max_tokens_given):
        wanted = room
    if wanted > room:
        raise InvalidRequest(
            f"{limit} You requested {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in "
            f"the {field}, {wanted} in the completion); lower {ask.max_tokens_field} to at most "
            f"{room} or shorten the {field}.",
            ask.max_tokens_field,
            "context_length_exceeded",
        )
    return replace(params, max_tokens=wanted).check()
