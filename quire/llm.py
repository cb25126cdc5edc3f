"""LLM and LLMEngine: the Python API, a whole engine in this process without sockets.

`LLM` blocks and takes lists; `LLMEngine` is for asyncio and streams. Names and outputs
are vLLM's.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Self

from quire.config import EngineConfig, from_settings
from quire.errors import InvalidRequest
from quire.generation import Generation, Message, Prompt, TextEngine
from quire.local import Event
from quire.outputs import EmbeddingRequestOutput, EngineStats, Health, RequestOutput
from quire.sampling import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of ints is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    rows: list[Any] = list(prompts)
    if rows and all(isinstance(row, int) for row in rows):
        return [rows]
    return rows


def _params(params: Params, count: int, default: SamplingParams) -> list[SamplingParams]:
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequest(
            f"{len(params)} sampling_params for {count} prompts; give one, or one each.",
            "sampling_params",
        )
    return list(params)


class LLM:
    """A model, loaded and ready. Settings are EngineConfig's fields:
    `LLM("demo", max_num_seqs=8, kv_cache_memory_bytes="1GiB")`.

    Not thread-safe; use it as a context manager, or call close(), to stop its threads.
    """

    def __init__(self, model: str | PathLike[str] = "demo", **settings: Any) -> None:
        self._text = TextEngine(from_settings({"model": model, **settings}))
        self.vocab_size = self._text.vocab_size
        self.max_model_len = self._text.max_model_len

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs in the order of the prompts.

        Without sampling_params the model's own defaults apply, with max_tokens 16.
        Raises InvalidRequest for a prompt or parameters that can't be used.
        """
        rows = _prompts(prompts)
        params = _params(sampling_params, len(rows), self._text.default_params)
        runs = [Generation(self._text, p, s) for p, s in zip(rows, params, strict=True)]
        events: queue.SimpleQueue[tuple[Generation, int, Event]] = queue.SimpleQueue()
        unfinished = len(runs)
        try:
            for run in runs:
                run.start(lambda *event: events.put(event))
            while unfinished:
                run, index, event = events.get()
                unfinished -= run.apply(index, event)
        except BaseException:
            for run in runs:
                run.cancel()
            raise
        return [run.output for run in runs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        many: Iterable[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self._text.render(m, add_generation_prompt) for m in many]
        return self.generate(prompts, sampling_params)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[EmbeddingRequestOutput]:
        """The pooled vector of each prompt: the last token's final hidden state, of length 1."""
        return self._text.embed(_prompts(prompts))

    def get_tokenizer(self) -> Any:
        """The quire_gateway.text.tokenizer.Tokenizer in use."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What applies where nothing is given: the model's own defaults."""
        return self._text.default_params

    def get_stats(self) -> EngineStats:
        """Counts of scheduler and KV memory now."""
        return self._text.stats()

    def health_check(self) -> Health:
        """Whether tokens come out when they should."""
        return self._text.health()

    def check(self) -> None:
        """Prove that every block is accounted for, once idle. Raises when one is not."""
        self._text.local.engine.check()

    def close(self) -> None:
        """Stop the engine's threads and let go of the model."""
        self._text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class LLMEngine:
    """The same for asyncio: requests come and go while others run.

    `LLMEngine(EngineConfig(model="demo"))` loads the model before it returns.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._text = TextEngine((config or EngineConfig()).check())
        self.vocab_size = self._text.vocab_size
        self.max_model_len = self._text.max_model_len

    @classmethod
    def from_model_path(cls, path: str | PathLike[str], **settings: Any) -> LLMEngine:
        """An engine for the model at `path`; settings are EngineConfig's fields."""
        return cls(from_settings({"model": path, **settings}))

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """Continue each prompt to its end; outputs in the order of the prompts."""
        rows = _prompts(prompts)
        params = _params(sampling_params, len(rows), self._text.default_params)
        return list(
            await asyncio.gather(*(self._last(p, s) for p, s in zip(rows, params, strict=True)))
        )

    async def _last(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        run, events = self._start(prompt, params)
        try:
            while not run.output.finished:
                run.apply(*await events.get())
        except BaseException:
            run.cancel()
            raise
        return run.output

    async def generate_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Continue one prompt; yields all of it so far whenever there is more. Leaving the
        loop early cancels the request."""
        run, events = self._start(prompt, sampling_params or self._text.default_params)
        try:
            while not run.output.finished:
                run.apply(*await events.get())
                while not run.output.finished and not events.empty():
                    run.apply(*events.get_nowait())
                yield run.snapshot()
        finally:
            run.cancel()

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Like generate_stream, for a conversation."""
        return self.generate_stream(self._text.render(messages), sampling_params)

    def _start(
        self, prompt: Prompt, params: SamplingParams
    ) -> tuple[Generation, asyncio.Queue[tuple[int, Event]]]:
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        run = Generation(self._text, prompt, params)

        def notify(_: Generation, index: int, event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        run.start(notify)
        return run, events

    def get_default_sampling_params(self) -> SamplingParams:
        """What applies where nothing is given: the model's own defaults."""
        return self._text.default_params

    def get_stats(self) -> EngineStats:
        """Counts of scheduler and KV memory now."""
        return self._text.stats()

    def health_check(self) -> Health:
        """Whether tokens come out when they should."""
        return self._text.health()

    def check(self) -> None:
        """Prove that every block is accounted for, once idle. Raises when one is not."""
        self._text.local.engine.check()

    def shutdown(self) -> None:
        """Stop the engine's threads and let go of the model."""
        self._text.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.shutdown()
