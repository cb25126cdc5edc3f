"""Continuous batching against static batches, on the same server and worker.

Static: a batch is sent, and the next one when its last request has ended. Continuous: all are
sent, and the server runs as many at a time as a batch has. Outputs differ much in length.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

import aiohttp
from harness import Reply, body, complete, parser, percentile, random_prompt, record, session, table
from server import Server, serve


def workload(args: argparse.Namespace, round_: int) -> list[bytes]:
    """Bodies with prompts of 16 to --prompt-tokens and outputs spread evenly in their logarithm."""
    rng = random.Random(f"{args.seed} {round_}")
    low, high = args.output_tokens
    return [
        body(
            random_prompt(rng, rng.randint(16, args.prompt_tokens)),
            round(low * (high / low) ** rng.random()),
        )
        for _ in range(args.requests)
    ]


async def continuous(
    http: aiohttp.ClientSession, server: Server, work: list[bytes], batch: int
) -> list[Reply]:
    return list(await asyncio.gather(*(complete(http, server.url, data) for data in work)))


async def static(
    http: aiohttp.ClientSession, server: Server, work: list[bytes], batch: int
) -> list[Reply]:
    replies: list[Reply] = []
    for begin in range(0, len(work), batch):
        replies += await continuous(http, server, work[begin : begin + batch], batch)
    return replies


async def run(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways in turn, with prompts of their own each round, but the same lengths both ways."""
    seconds: dict[str, list[float]] = {"static": [], "continuous": []}
    replies: dict[str, list[Reply]] = {"static": [], "continuous": []}
    waited: dict[str, list[float]] = {"static": [], "continuous": []}
    async with session() as http:
        await continuous(http, server, workload(args, -1)[: args.batch], args.batch)
        for round_ in range(args.rounds):
            for name, how in (("static", static), ("continuous", continuous)):
                work = workload(args, round_)
                begin = time.perf_counter()
                found = await how(http, server, work, args.batch)
                seconds[name].append(time.perf_counter() - begin)
                if bad := [r for r in found if not r.ok]:
                    raise RuntimeError(f"{bad[0].status}: {bad[0].error}")
                replies[name] += found
                waited[name] += [reply.ended - begin for reply in found]
    return [
        {
            "batching": name,
            "batch": args.batch,
            "tokens_per_s": sum(r.num_tokens for r in replies[name]) / sum(seconds[name]),
            "seconds": sum(seconds[name]),
            "done_p50_s": percentile(waited[name], 0.5),  # from the round's beginning
            "done_p99_s": percentile(waited[name], 0.99),
        }
        for name in seconds
    ]


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--requests", type=int, default=96, help="of each round")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--prompt-tokens", type=int, default=256, help="the longest; 16 or more")
    flags.add_argument("--output-tokens", type=int, nargs=2, default=[8, 512], help="from, to")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--flag", action="append", default=[], help="another flag of the server")
    args = flags.parse_args()
    server_flags = [
        # without the cache, or the second way would find the first one's prompts
        *("--max-num-seqs", str(args.batch), "--no-enable-prefix-caching", *args.flag),
    ]
    with serve(args.model, *server_flags) as server:
        rows = asyncio.run(run(server, args))
    ratio = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    print(table(rows))
    print(f"continuous batching: {ratio:.2f} times the throughput of static batches")
    record("static", args, {"rows": rows, "ratio": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
