"""What the prefix cache saves: time to the first token, and blocks in conversations.

(a) a second request with a shared prefix against the first one; (b) a prompt that is cached
whole, as a multiple of one decode step; (c) conversations with and without sharing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from typing import Any

import aiohttp
from harness import Reply, body, complete, parser, random_prompt, record, session, table
from server import Server, serve


async def ask(
    http: aiohttp.ClientSession, server: Server, prompt: list[int], max_tokens: int
) -> Reply:
    reply = await complete(http, server.url, body(prompt, max_tokens))
    if not reply.ok:
        raise RuntimeError(f"{reply.status}: {reply.error}")
    return reply


async def shared_prefix(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """(a) and (b): medians over --pairs prompts that are met for the first time."""
    rng = random.Random(args.seed)
    cold, warm, whole, gaps, cached = [], [], [], [], []
    async with session() as http:
        await ask(http, server, random_prompt(rng, 64), 8)
        for _ in range(args.pairs):
            prefix = random_prompt(rng, args.prefix_tokens)
            first, second = (prefix + random_prompt(rng, args.own_tokens) for _ in range(2))
            cold.append((await ask(http, server, first, 1)).ttft)
            reply = await ask(http, server, second, 1)
            warm.append(reply.ttft)
            cached.append(reply.num_cached_tokens)
            again = await ask(http, server, second, args.decode_tokens)
            whole.append(again.ttft)
            gaps += again.gaps
    step = statistics.median(gaps)
    return {
        "cold_ttft_ms": 1e3 * statistics.median(cold),
        "shared_ttft_ms": 1e3 * statistics.median(warm),
        "cold/shared": statistics.median(c / w for c, w in zip(cold, warm, strict=True)),
        "cached_tokens": min(cached),
        "whole_ttft_ms": 1e3 * statistics.median(whole),
        "decode_step_ms": 1e3 * step,
        "whole/step": statistics.median(whole) / step,
    }


async def conversations(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """(c) --chats conversations of --turns turns behind one system prompt, a turn of all at a
    time. Blocks taken = what each request needs less what it shares."""
    rng, block_size = random.Random(args.seed), args.block_size
    system = random_prompt(rng, args.system_tokens)
    histories = [list(system) for _ in range(args.chats)]
    taken, most, peak = 0, 0.0, [0.0]
    tokens = random.Random(args.seed + 1)
    async with session() as http:
        for _ in range(args.turns):
            for history in histories:
                history += random_prompt(rng, args.user_tokens)
            watcher = asyncio.create_task(_watch(server, peak))
            replies = await asyncio.gather(
                *(ask(http, server, history, args.answer_tokens) for history in histories)
            )
            watcher.cancel()
            for history, reply in zip(histories, replies, strict=True):
                needed = -(-(len(history) + reply.num_tokens) // block_size)
                taken += needed - reply.num_cached_tokens // block_size
                most = max(most, needed)
                # the answer's ids are not in the stream; the next turn quotes other ones, so that
                # only what was prompt is shared: the lower bound of what a real chat shares
                history += random_prompt(tokens, reply.num_tokens)
    return {"blocks_taken": taken, "most_used_at_once": peak[0], "longest": most}


async def _watch(server: Server, peak: list[float]) -> None:
    while True:
        used = await asyncio.to_thread(server.metric, "quire_kv_blocks_used")
        peak[0] = max(peak[0], used)
        await asyncio.sleep(0.02)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    block = ["--block-size", str(args.block_size)]
    with serve(args.model, *block) as server:
        ttft = asyncio.run(shared_prefix(server, args))
        shared = asyncio.run(conversations(server, args))
    with serve(args.model, *block, "--no-enable-prefix-caching") as server:
        alone = asyncio.run(conversations(server, args))
    rows = [{"chats": "shared"} | shared, {"chats": "each its own"} | alone]
    saved = {k: 100 * (1 - shared[k] / alone[k]) for k in ("blocks_taken", "most_used_at_once")}
    print(table([ttft]), table(rows), sep="\n\n")
    print(f"saved: {saved['blocks_taken']:.1f} % of blocks taken, "
          f"{saved['most_used_at_once']:.1f} % of those used at once")  # fmt: skip
    return {"ttft": ttft, "conversations": rows, "saved_percent": saved}


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--block-size", type=int, default=16)
    flags.add_argument("--pairs", type=int, default=9)
    flags.add_argument("--prefix-tokens", type=int, default=1024)
    flags.add_argument("--own-tokens", type=int, default=16)
    flags.add_argument("--decode-tokens", type=int, default=32)
    flags.add_argument("--chats", type=int, default=4)
    flags.add_argument("--turns", type=int, default=8)
    flags.add_argument("--system-tokens", type=int, default=256)
    flags.add_argument("--user-tokens", type=int, default=64)
    flags.add_argument("--answer-tokens", type=int, default=96)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    result = measure(args)
    record("prefix", args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
