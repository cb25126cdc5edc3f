"""Hit rates of the eviction policies on three kinds of traffic, in the scheduler's own KV manager.

No model and no server: requests go through match, allocate, publish and release as in the engine,
some of them at a time. Cache sizes are shares of what a cache without bounds would hold.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import parser, record, table
from numpy.typing import NDArray

from quire_scheduler.kv import KVHandle, KVManager, ModelIdentity, Namespace
from quire_scheduler.kv.eviction import POLICIES

Tokens = NDArray[np.int32]
BLOCK_SIZE = 16
RUNNING = 8  # requests that hold their blocks at a time
IDENTITY = ModelIdentity(b"benchmark", "bfloat16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `tokens` are prompt and output, of which the last num_output are output."""

    at: float  # seconds
    tokens: Tokens
    num_output: int


def text(rng: random.Random, low: int, high: int) -> Tokens:
    """Tokens that nobody else has."""
    return np.frombuffer(rng.randbytes(4 * rng.randint(low, high)), np.int32) & 0x7FFF


def zipf(rng: random.Random, count: int, skew: float) -> Callable[[], int]:
    """Draws from 0..count-1, the first ones most often."""
    weights = list(itertools.accumulate((k + 1) ** -skew for k in range(count)))
    return lambda: rng.choices(range(count), cum_weights=weights)[0]


def interleave(sessions: Iterator[Iterator[Turn]]) -> Iterator[Turn]:
    """Turns of many sessions by time; sessions begin in order of time."""
    heap: list[tuple[float, int, Turn, Iterator[Turn]]] = []
    number = itertools.count()
    for turns in sessions:
        first = next(turns)
        while heap and heap[0][0] <= first.at:
            yield (best := heapq.heappop(heap))[2]
            if (later := next(best[3], None)) is not None:
                heapq.heappush(heap, (later.at, next(number), later, best[3]))
        heapq.heappush(heap, (first.at, next(number), first, turns))
    while heap:
        yield (best := heapq.heappop(heap))[2]
        if (later := next(best[3], None)) is not None:
            heapq.heappush(heap, (later.at, next(number), later, best[3]))


def chat(rng: random.Random) -> Iterator[Turn]:
    """Conversations of 1 to 12 turns with pauses of a minute, behind a few system prompts."""
    systems = [text(rng, 100, 600) for _ in range(12)]
    which = zipf(rng, len(systems), 1.0)

    def conversation(begin: float) -> Iterator[Turn]:
        tokens, at = systems[which()], begin
        for _ in range(rng.randint(1, 12)):
            answer = text(rng, 40, 400)
            tokens = np.concatenate((tokens, text(rng, 10, 150), answer))
            yield Turn(at, tokens, len(answer))
            at += 5 + rng.expovariate(1 / 60)

    return interleave(conversation(k * 2.0) for k in itertools.count())


def rag(rng: random.Random) -> Iterator[Turn]:
    """Single questions about documents, some far more popular; what is popular drifts slowly."""
    instruction = text(rng, 200, 200)
    documents = [text(rng, 500, 2000) for _ in range(1500)]
    which = zipf(rng, len(documents), 0.9)
    for k in itertools.count():
        document = documents[(which() + k // 50) % len(documents)]
        answer = text(rng, 50, 200)
        tokens = np.concatenate((instruction, document, text(rng, 15, 60), answer))
        yield Turn(k * 0.5, tokens, len(answer))


def agents(rng: random.Random) -> Iterator[Turn]:
    """Tasks of many quick steps over a growing context behind long tool descriptions; one request
    in three is a scan of something that is read once."""
    tools = [text(rng, 1500, 4000) for _ in range(6)]
    which = zipf(rng, len(tools), 0.8)

    def task(begin: float) -> Iterator[Turn]:
        tokens, at = tools[which()], begin
        for _ in range(rng.randint(5, 30)):
            answer = text(rng, 20, 150)
            tokens = np.concatenate((tokens, text(rng, 30, 500), answer))
            yield Turn(at, tokens, len(answer))
            at += 1 + rng.expovariate(1 / 4)
            if rng.random() < 0.5:
                scan = text(rng, 500, 3000)
                yield Turn(at, scan, 20)
                at += 1.0

    return interleave(task(k * 8.0) for k in itertools.count())


TRACES = {"chat": chat, "rag": rag, "agents": agents}


class Cache:
    """A KV manager that is used as the engine uses it."""

    def __init__(self, num_blocks: int, policy: str) -> None:
        self.now = 0.0
        self.kv = KVManager(
            num_blocks, BLOCK_SIZE, IDENTITY, eviction_policy=policy, clock=lambda: self.now
        )
        self._running: deque[KVHandle] = deque()
        self._seq = 0

    def run(self, turn: Turn) -> None:
        """Serve one request; the oldest of those running ends when there are too many."""
        kv, prompt = self.kv, turn.tokens[: len(turn.tokens) - turn.num_output]
        self.now, self._seq = turn.at, self._seq + 1
        if len(self._running) >= RUNNING:
            kv.release(self._running.popleft())
        _, handle = kv.match_prefix(prompt, Namespace())
        wanted = -(-len(turn.tokens) // BLOCK_SIZE) - handle.num_blocks
        while kv.allocate_for(handle, wanted) is None:
            kv.release(self._running.popleft())  # IndexError: the cache is smaller than a request
        kv.publish(handle, prompt, self._seq)
        kv.acknowledge(self._seq)
        kv.publish(handle, turn.tokens[:-1], self._seq)  # the last token's KV is never written
        self._running.append(handle)

    @property
    def hit_rate(self) -> float:
        return self.kv.stats.hit_tokens / max(self.kv.stats.query_tokens, 1)


def replay(turns: list[Turn], num_blocks: int, policy: str) -> tuple[Cache, float]:
    """The cache after the trace, and the seconds that took."""
    cache, begin = Cache(num_blocks, policy), time.perf_counter()
    for turn in turns:
        cache.run(turn)
    took = time.perf_counter() - begin
    cache.kv.check()
    return cache, took


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, generate in TRACES.items():
        turns = list(itertools.islice(generate(random.Random(args.seed)), args.requests))
        most = sum(-(-len(turn.tokens) // BLOCK_SIZE) for turn in turns) + 1
        whole, _ = replay(turns, most, "lru")
        held = whole.kv.num_cached + whole.kv.num_used
        floor = 2 * max(-(-len(turn.tokens) // BLOCK_SIZE) for turn in turns)
        for share in args.sizes:
            num_blocks = max(int(held * share), floor) + 1
            row: dict[str, Any] = {
                "trace": name, "cache": f"{share:.0%}", "blocks": num_blocks - 1,
                "unbounded_%": 100 * whole.hit_rate,
            }  # fmt: skip
            micros = 0.0
            for policy in POLICIES:
                cache, took = replay(turns, num_blocks, policy)
                row[f"{policy}_%"] = 100 * cache.hit_rate
                micros = max(micros, 1e6 * took / len(turns))
            rates = {policy: row[f"{policy}_%"] for policy in POLICIES}
            best = max(rates, key=lambda policy: rates[policy])
            close = sorted(rates.values())[-2] > rates[best] - 0.5
            rows.append(row | {"best": "even" if close else best, "us_per_request": micros})
            print(".", end="", flush=True)
    print()
    return rows


def main() -> int:
    flags = parser(__doc__, model=None)
    flags.add_argument("--requests", type=int, default=4000, help="of each trace")
    flags.add_argument("--sizes", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rows = measure(args)
    print(table(rows))
    record("eviction", args, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
