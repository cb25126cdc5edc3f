"""Generation: the choices of one HTTP request, from submission to the last token.

Chat and completions, streamed or not, all read their text here. Knows neither JSON nor HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from quire.v1 import common_pb2
from quire_gateway.engine_client import EngineClient
from quire_gateway.engine_request import OpenRequest, Submission
from quire_gateway.logprobs import TokenLogprobs
from quire_gateway.openai.shapes import Usage
from quire_gateway.prompts import Tokenised
from quire_gateway.text import TextStream, Tokenizer

# (loop time, tokens, whether they are the choice's first): called once per engine message
OnTokens = Callable[[float, int, "Choice"], None]


@dataclass(frozen=True, slots=True)
class Update:
    """What is new of one choice."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprobs]
    offset: int  # characters of the choice's text before this
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Choice:
    """One output sequence."""

    def __init__(
        self, index: int, prompt: Tokenised, tokenizer: Tokenizer, request: OpenRequest
    ) -> None:
        self.index = index
        self.request = request
        self.last_arrival: float | None = None
        self.finish_reason: str | None = None
        self._prompt = prompt
        self._text = TextStream(tokenizer, prompt.params, prompt.token_ids)
        self._before = prompt.echo
        self._offset = 0

    @property
    def num_tokens(self) -> int:
        """Output tokens, up to the one that completed a stop string."""
        return self._text.num_tokens

    def poll(self, on_tokens: OnTokens) -> Update | None:
        """What has come since the last call. Raises QuireError when the engine failed."""
        delta = self.request.take()
        if delta is None:
            return None
        for arrival, count in delta.arrivals:
            on_tokens(arrival, count, self)
            self.last_arrival = arrival
        seen = self.num_tokens
        finish = delta.finish_reason
        text = self._before + self._text.push(
            delta.token_ids,
            last=finish != common_pb2.FINISH_REASON_UNSPECIFIED,
            stopped=finish == common_pb2.FINISH_REASON_STOP,
        )
        self._before = ""
        offset, self._offset = self._offset, self._offset + len(text)
        stop_reason: str | int | None = None
        if self._text.stop_string is not None:
            self.finish_reason, stop_reason = "stop", self._text.stop_string
        elif finish == common_pb2.FINISH_REASON_STOP:
            self.finish_reason = "stop"
            if delta.stop_token_id in self._prompt.params.stop_token_ids:
                stop_reason = delta.stop_token_id
        elif finish:
            self.finish_reason = "length"
        logprobs = delta.logprobs[: self.num_tokens - seen]
        return Update(self.index, text, logprobs, offset, self.finish_reason, stop_reason)


class _Ticker:
    """Rings a bell after each `interval` seconds without restart(). One timer for a whole
    stream: a timeout around every wait would cost more than the wait."""

    def __init__(self, bell: asyncio.Event, interval: float) -> None:
        self._bell = bell
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._rang = False
        self._timer = self._loop.call_later(interval, self._tick) if interval else None

    def _tick(self) -> None:
        rest = self._last + self._interval - self._loop.time()
        if rest <= 0:
            self._rang = True
            self._bell.set()
            self.restart()
            rest = self._interval
        self._timer = self._loop.call_later(rest, self._tick)

    def restart(self) -> None:
        self._last = self._loop.time()

    def take(self) -> bool:
        """Whether it has rung since the last take()."""
        rang, self._rang = self._rang, False
        return rang

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Generation:
    """All choices of one request: n for each prompt, numbered prompt by prompt. Close it on
    every way out; what is not finished is then cancelled."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prompts: Sequence[Tokenised],
        template: Submission,
        on_tokens: OnTokens,
    ) -> None:
        self._engine = engine
        self._on_tokens = on_tokens
        self._bell = asyncio.Event()
        self._num_prompt_tokens = sum(len(p.token_ids) for p in prompts)
        self.choices: list[Choice] = []
        self._firsts: list[Choice] = []  # choice 0 of each prompt
        total = sum(p.params.n for p in prompts)
        for prompt in prompts:
            for k in range(prompt.params.n):
                index = len(self.choices)
                suffix = f"-{index}" if total > 1 else ""
                submission = replace(
                    template,
                    request_id=template.request_id + suffix,
                    prompt_token_ids=prompt.token_ids,
                    sampling_params=prompt.params.choice(k).to_proto(),
                    num_together=total,
                    num_more=total - index - 1,
                )
                request = engine.submit(submission, self._bell)
                self.choices.append(Choice(index, prompt, tokenizer, request))
                if k == 0:
                    self._firsts.append(self.choices[-1])

    async def updates(self, silence: float = 0.0) -> AsyncIterator[list[Update]]:
        """Batches of what is new, until every choice has finished; an empty batch after each
        `silence` seconds without any (0 = never). Raises QuireError when a choice fails."""
        running = list(self.choices)
        ticker = _Ticker(self._bell, silence)
        try:
            while running:
                await self._bell.wait()
                self._bell.clear()
                batch = []
                for choice in running:
                    update = choice.poll(self._on_tokens)
                    if update is not None:
                        batch.append(update)
                        if update.finish_reason:
                            self._engine.cancel(choice.request)  # a stop string ends it here
                running = [choice for choice in running if choice.finish_reason is None]
                if batch:
                    ticker.restart()
                    yield batch
                elif ticker.take():
                    yield []
        finally:
            ticker.stop()

    def close(self) -> None:
        """Cancel what still runs. May be called twice."""
        for choice in self.choices:
            self._engine.cancel(choice.request)

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(c.request.num_cached_tokens or 0 for c in self._firsts),
        )
