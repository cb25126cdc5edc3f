"""Made-up traces of three shapes: chat, RAG and agents, arriving as a Poisson process.

`SPEC` is shape:key=value,... as chat:rate=5,requests=1000. Same spec and seed, same trace. Prompts
share prefixes as such traffic does: a chat's turn begins with the turns before it, RAG questions
share documents, agents share a system prompt and go on from their own steps. Answers are the
table's own tokens, so that the next turn finds them in the cache. Knows no engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.errors import ConfigError
from quire.simulation.trace import FIRST_TOKEN, I32, Arrival

Random = np.random.Generator


@dataclass(frozen=True)
class Key:
    """One number of a spec. `whole`: an integer."""

    default: float
    low: float
    high: float
    whole: bool = True


COMMON = {
    "rate": Key(2.0, 1e-6, 1e6, whole=False),  # requests a second
    "requests": Key(500, 1, 1_000_000),
    "output": Key(64, 1, 1 << 20),  # mean tokens of an answer
}
SHAPES: dict[str, dict[str, Key]] = {
    "poisson": {"prompt": Key(256, 1, 1 << 20)},  # mean tokens; nothing shared
    "chat": {
        "system": Key(64, 0, 1 << 20),  # tokens that all chats begin with
        "user": Key(32, 1, 1 << 20),  # mean tokens of what the user says
        "turns": Key(5, 1, 1000),  # mean of a chat
        "think": Key(10.0, 0.0, 1e6, whole=False),  # mean seconds between an answer and the next
    },
    "rag": {
        "documents": Key(50, 1, 1_000_000),
        "document": Key(400, 1, 1 << 20),  # mean tokens
        "question": Key(24, 1, 1 << 20),
        "skew": Key(1.0, 0.0, 10.0, whole=False),  # of how often documents are asked about
    },
    "agents": {
        "system": Key(300, 0, 1 << 20),
        "tasks": Key(8, 1, 10_000),  # different system prompts
        "steps": Key(8, 1, 1000),  # mean of one run
        "observation": Key(48, 1, 1 << 20),  # mean tokens a tool gives back
        "think": Key(1.0, 0.0, 1e6, whole=False),
    },
}


@dataclass(frozen=True)
class Vocabulary:
    """How the simulated model answers: its size, and tokens after a prompt."""

    size: int
    max_model_len: int
    answer: Callable[[I32, int, int], I32]  # (prompt, number of the request, count) -> tokens


def parse(spec: str) -> tuple[str, dict[str, float]]:
    """(shape, numbers). Raises ConfigError."""
    shape, _, rest = spec.partition(":")
    if shape not in SHAPES:
        raise ConfigError(f"--generate {shape!r} is not one of {', '.join(SHAPES)}.")
    keys = {**COMMON, **SHAPES[shape]}
    found = {name: key.default for name, key in keys.items()}
    for part in filter(None, rest.split(",")):
        name, _, text = part.partition("=")
        key = keys.get(name)
        if key is None:
            raise ConfigError(f"--generate {shape}: unknown {name!r}; known: {', '.join(keys)}.")
        try:
            value = float(int(text)) if key.whole else float(text)
        except ValueError:
            value = float("nan")
        if not key.low <= value <= key.high:
            kind = "an integer" if key.whole else "a number"
            raise ConfigError(
                f"--generate {shape}: {name} must be {kind} between {key.low:g} and {key.high:g}, "
                f"not {text!r}."
            )
        found[name] = value
    return shape, found


def generate(spec: str, vocabulary: Vocabulary, seed: int) -> list[Arrival]:
    """The requests by arrival. Raises ConfigError."""
    shape, numbers = parse(spec)
    rng = np.random.default_rng(seed)
    maker = {"poisson": _poisson, "chat": _chat, "rag": _rag, "agents": _agents}[shape]
    count = int(numbers["requests"])
    return [one for one, _ in zip(maker(numbers, vocabulary, rng), range(count), strict=False)]


def _poisson(n: dict[str, float], v: Vocabulary, rng: Random) -> Iterator[Arrival]:
    number, now = 0, 0.0
    while True:
        now += rng.exponential(1 / n["rate"])
        output = _length(n["output"], rng)
        prompt = _tokens(_length(n["prompt"], rng), v, rng)
        yield _arrival(now, prompt, output, number, v)
        number += 1


def _rag(n: dict[str, float], v: Vocabulary, rng: Random) -> Iterator[Arrival]:
    documents = [_tokens(_length(n["document"], rng), v, rng) for _ in range(int(n["documents"]))]
    weights = 1.0 / np.arange(1, len(documents) + 1) ** n["skew"]
    weights /= weights.sum()
    number, now = 0, 0.0
    while True:
        now += rng.exponential(1 / n["rate"])
        document = documents[int(rng.choice(len(documents), p=weights))]
        prompt = np.concatenate((document, _tokens(_length(n["question"], rng), v, rng)))
        yield _arrival(now, prompt, _length(n["output"], rng), number, v)
        number += 1


def _chat(n: dict[str, float], v: Vocabulary, rng: Random) -> Iterator[Arrival]:
    system = _tokens(int(n["system"]), v, rng)
    return _talks(n, v, rng, lambda: system, n["turns"], n["user"])


def _agents(n: dict[str, float], v: Vocabulary, rng: Random) -> Iterator[Arrival]:
    systems = [_tokens(int(n["system"]), v, rng) for _ in range(int(n["tasks"]))]
    pick = lambda: systems[int(rng.integers(len(systems)))]  # noqa: E731
    return _talks(n, v, rng, pick, n["steps"], n["observation"])


def _talks(
    n: dict[str, float],
    v: Vocabulary,
    rng: Random,
    system: Callable[[], I32],
    turns: float,
    said: float,
) -> Iterator[Arrival]:
    """Conversations: each turn's prompt is all that came before, the answer, and something new.
    Conversations begin so often that requests come at the rate asked for, once they overlap."""
    begins = rng.exponential(turns / n["rate"])
    waiting: list[tuple[float, int, Any, int]] = []  # when, tie-breaker, prompt, turns left
    number = order = 0
    while True:
        if not waiting or begins <= waiting[0][0]:
            order += 1
            prompt = np.concatenate((system(), _tokens(_length(said, rng), v, rng)))
            heapq.heappush(waiting, (begins, order, prompt, int(rng.geometric(1 / turns))))
            begins += rng.exponential(turns / n["rate"])
            continue
        now, _, prompt, left = heapq.heappop(waiting)
        output = _length(n["output"], rng)
        arrival = _arrival(now, prompt, output, number, v)
        yield arrival
        if left > 1:
            answer = v.answer(prompt, number, arrival.num_output_tokens)
            prompt = np.concatenate((prompt, answer, _tokens(_length(said, rng), v, rng)))
            if len(prompt) + 1 < v.max_model_len:  # else the conversation is too long: it ends
                order += 1
                wait = rng.exponential(n["think"]) if n["think"] else 0.0
                heapq.heappush(waiting, (now + wait, order, prompt, left - 1))
        number += 1


def _arrival(now: float, prompt: I32, output: int, number: int, v: Vocabulary) -> Arrival:
    prompt = prompt[: v.max_model_len - 1]
    return Arrival(
        arrival_s=now,
        num_prompt_tokens=len(prompt),
        num_output_tokens=min(output, v.max_model_len - len(prompt)),
        request_id=f"r{number}",
        prompt_token_ids=tuple(prompt.tolist()),
    )


def _length(mean: float, rng: Random) -> int:
    """Lengths spread as in real traffic: most are shorter than the mean, some much longer."""
    return max(int(rng.lognormal(np.log(mean) - 0.32, 0.8)), 1)


def _tokens(count: int, v: Vocabulary, rng: Random) -> I32:
    return rng.integers(min(FIRST_TOKEN, v.size - 1), v.size, count, dtype=np.int32)
