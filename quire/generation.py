"""TextEngine and Generation: text around a LocalEngine, one prompt with its n choices.

What `LLM` and `LLMEngine` share. Knows no event loop: a generation's events arrive through a
callback, and whoever owns it applies them one by one.
"""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quire import hub
from quire.config import EngineConfig
from quire.errors import InvalidRequest
from quire.local import Event, LocalEngine
from quire.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EngineStats,
    Health,
    Logprob,
    MemoryStats,
    RequestOutput,
    SchedulerStats,
)
from quire.sampling import SamplingParams
from quire.v1 import common_pb2 as pb

if TYPE_CHECKING:
    from quire_gateway.text.stream import TextStream

# A prompt: text, token ids, or vLLM's {"prompt": text} / {"prompt_token_ids": ids}.
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
Notify = Callable[["Generation", int, Event], None]

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}


class TextEngine:
    """A model in this process with its tokenizer and chat template."""

    def __init__(self, config: EngineConfig) -> None:
        from quire_gateway import text

        folder = hub.resolve(config.model, config.revision or None)
        words = hub.resolve_tokenizer(config.tokenizer, folder)
        model = text.load(folder, words, config.chat_template, config.generation_config)
        self.tokenizer, self.template = model.tokenizer, model.template
        self.default_params = SamplingParams(**model.defaults.sampling)
        self.local = LocalEngine(config)
        self.vocab_size = self.local.model.vocab_size
        self.max_model_len = self.local.model.max_model_len

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt. Raises InvalidRequest."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise InvalidRequest(
                    "a prompt dict needs 'prompt' or 'prompt_token_ids'.", "prompt"
                )
            prompt = str(prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, [int(token) for token in prompt]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> Prompt:
        """The prompt of a conversation. Raises InvalidRequest when the model has no template."""
        if self.template is None:
            raise InvalidRequest(
                "the model has no chat template; give one with chat_template=FILE, or use "
                "generate().",
                "messages",
            )
        text = self.template.render([dict(m) for m in messages], add_generation_prompt)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def embed(self, prompts: Sequence[Prompt]) -> list[EmbeddingRequestOutput]:
        """The pooled vector of each prompt, in order; waits for all. Raises a request's error."""
        rows = [self.encode(prompt)[1] for prompt in prompts]
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        ids = [uuid.uuid4().hex for _ in rows]
        handles = [
            self.local.submit(
                token_ids,
                SamplingParams(),
                lambda event, index=index: events.put((index, event)),  # type: ignore[misc]
                request_id=ids[index],
                pool=True,
            )
            for index, token_ids in enumerate(rows)
        ]
        vectors: dict[int, list[float]] = {}
        while len(vectors) < len(rows):
            index, event = events.get()
            if event.error is not None:
                for handle in handles:
                    self.local.cancel(handle)
                raise event.error
            vectors[index] = event.embedding or []
        return [
            EmbeddingRequestOutput(ids[index], EmbeddingOutput(vectors[index]), token_ids)
            for index, token_ids in enumerate(rows)
        ]

    def stats(self) -> EngineStats:
        """Counts of scheduler and KV memory now."""
        now = self.local.engine.stats()
        return EngineStats(
            scheduler=SchedulerStats(
                running_sequences=now.num_running,
                waiting_sequences=now.num_waiting,
                num_preemptions=now.num_preemptions,
                num_requests=now.num_requests,
            ),
            memory=MemoryStats(
                num_blocks_total=now.num_blocks_total,
                num_blocks_used=now.num_blocks_used,
                num_blocks_cached=now.num_blocks_cached,
            ),
            cache_hit_rate=now.prefix_hit_tokens / max(now.prefix_query_tokens, 1),
        )

    def health(self) -> Health:
        """Whether tokens come out when they should."""
        now = self.local.engine.stats()
        problem = "" if self.local.healthy else "the worker thread has ended"
        return Health(is_healthy=now.healthy and not problem, problem=problem or now.problem)

    def close(self) -> None:
        self.local.close()


class Generation:
    """One prompt being continued. `output` is what is known so far; only its owner, who calls
    `apply`, touches it."""

    def __init__(self, engine: TextEngine, prompt: Prompt, params: SamplingParams) -> None:
        from quire_gateway.text.stream import TextStream

        text, token_ids = engine.encode(prompt)
        self._engine = engine
        self._params = params.check(engine.vocab_size).seeded()
        self.output = RequestOutput(
            request_id=uuid.uuid4().hex,
            prompt=text,
            prompt_token_ids=token_ids,
            outputs=[
                CompletionOutput(
                    index=index,
                    logprobs=None if params.logprobs is None else [],
                    cumulative_logprob=None if params.logprobs is None else 0.0,
                )
                for index in range(params.n)
            ],
        )
        self._streams: list[TextStream] = [
            TextStream(engine.tokenizer, self._params, token_ids) for _ in range(params.n)
        ]
        self._handles: list[int] = []

    def start(self, notify: Notify) -> None:
        """Submit all choices; notify(self, choice, event) is called on the engine's thread."""
        for index in range(self._params.n):
            self._handles.append(
                self._engine.local.submit(
                    self.output.prompt_token_ids,
                    self._params.choice(index),
                    lambda event, index=index: notify(self, index, event),  # type: ignore[misc]
                    request_id=f"{self.output.request_id}-{index}",
                )
            )

    def apply(self, index: int, event: Event) -> bool:
        """Add one event to `output`; True when that ended the last choice. Raises the
        request's error."""
        if event.error is not None:
            self.cancel()
            raise event.error
        choice, stream = self.output.outputs[index], self._streams[index]
        if choice.finished:
            return False
        last = event.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        before = stream.num_tokens
        choice.text += stream.push(
            event.token_ids, last=last, stopped=event.finish_reason == pb.FINISH_REASON_STOP
        )
        kept = stream.num_tokens - before  # a stop string may end it early
        choice.token_ids += event.token_ids[:kept]
        if choice.logprobs is not None and event.logprobs:
            self._add_logprobs(choice, event, kept)
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, event.num_cached_tokens)
        if stream.stop_string is not None:
            choice.finish_reason, choice.stop_reason = "stop", stream.stop_string
            if not last:
                self._engine.local.cancel(self._handles[index])
        elif last:
            choice.finish_reason = _REASONS[event.finish_reason]  # type: ignore[index]
            eos = event.stop_token_id if event.stop_token_id in self._params.stop_token_ids else -1
            choice.stop_reason = eos if eos >= 0 else None
        self.output.finished = all(c.finished for c in self.output.outputs)
        return self.output.finished

    def _add_logprobs(self, choice: CompletionOutput, event: Event, kept: int) -> None:
        assert choice.logprobs is not None and choice.cumulative_logprob is not None
        for row, rank in zip(event.logprobs[:kept], event.ranks[:kept], strict=True):
            sampled, *others = row
            entries = {token: (value, place) for place, (token, value) in enumerate(others, 1)}
            entries[sampled[0]] = (sampled[1], rank)
            choice.logprobs.append(
                {
                    token: Logprob(value, place, self._engine.tokenizer.decode([token], False))
                    for token, (value, place) in entries.items()
                }
            )
            choice.cumulative_logprob += sampled[1]

    def snapshot(self) -> RequestOutput:
        """A copy of `output` that later events do not change."""
        choices = [
            replace(c, token_ids=list(c.token_ids), logprobs=c.logprobs and list(c.logprobs))
            for c in self.output.outputs
        ]
        return replace(self.output, outputs=choices)

    def cancel(self) -> None:
        """Stop what still runs; its blocks are free before the next plan."""
        for choice, handle in zip(self.output.outputs, self._handles, strict=False):
            if not choice.finished:
                self._engine.local.cancel(handle)
