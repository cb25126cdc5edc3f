"""A long prompt arrives while streams decode: how long their tokens wait, and what it costs.

Each round starts the streams, lets them decode, and sends a prompt nobody has seen. One server
without --itl-target-ms, then one for each target: by default multiples of the decode step that
the first one showed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

from harness import Reply, body, complete, parser, percentile, random_prompt, record, session, table
from server import Server, serve


async def rounds(server: Server, args: argparse.Namespace) -> dict[str, float]:
    rng = random.Random(args.seed)
    before: list[float] = []  # gaps while only the streams decode
    during: list[list[float]] = []  # of each round: gaps that touch the prompt's time
    ttfts = []
    async with session() as http:
        await complete(http, server.url, body(random_prompt(rng, 64), 8))  # warm-up
        for _ in range(args.rounds):
            replies = [Reply() for _ in range(args.streams)]
            bodies = [body(random_prompt(rng, 16), args.stream_tokens) for _ in replies]
            streams = [
                asyncio.create_task(complete(http, server.url, data, reply))
                for data, reply in zip(bodies, replies, strict=True)
            ]
            await asyncio.sleep(args.lead_s)
            sent = time.perf_counter()
            prompt = random_prompt(rng, args.prompt_tokens)
            long = await complete(http, server.url, body(prompt, args.output_tokens))
            if not long.ok:
                raise RuntimeError(f"{long.status}: {long.error}")
            if any(stream.done() for stream in streams):
                raise RuntimeError("a stream ended before the prompt: raise --stream-tokens")
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            first = long.arrivals[0]
            ttfts.append(first - sent)
            found = []
            for reply in replies:
                pairs = zip(reply.arrivals, reply.arrivals[1:], strict=False)
                for a, b in list(pairs)[args.settle :]:
                    if b < sent:
                        before.append(b - a)
                    elif a < first:
                        found.append(b - a)
            during.append(found)
    worst = [max(gaps) for gaps in during]
    return {
        "decode_step_ms": 1e3 * statistics.median(before),
        "gap_p50_ms": 1e3 * statistics.median(gap for gaps in during for gap in gaps),
        "gap_p99_ms": 1e3 * percentile([gap for gaps in during for gap in gaps], 0.99),
        "worst_gap_median_ms": 1e3 * statistics.median(worst),
        "worst_gap_ms": 1e3 * max(worst),
        "long_ttft_ms": 1e3 * statistics.median(ttfts),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with serve(args.model, *args.flag) as server:
        plain = asyncio.run(rounds(server, args))
    rows: list[dict[str, Any]] = [{"target_ms": 0.0} | plain | {"worst/target": float("nan")}]
    targets = args.targets or [k * plain["decode_step_ms"] for k in (2.0, 4.0, 8.0)]
    for target in targets:
        with serve(args.model, "--itl-target-ms", f"{target:.2f}", *args.flag) as server:
            row = asyncio.run(rounds(server, args))
        ratio = row["worst_gap_median_ms"] / target
        rows.append({"target_ms": target} | row | {"worst/target": ratio})
    for row in rows:
        row["ttft_cost"] = row["long_ttft_ms"] / plain["long_ttft_ms"]
    return rows


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--targets", type=float, nargs="+", help="milliseconds")
    flags.add_argument("--streams", type=int, default=4)
    flags.add_argument("--stream-tokens", type=int, default=1500)
    flags.add_argument("--prompt-tokens", type=int, default=2000)
    flags.add_argument("--output-tokens", type=int, default=4)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--lead-s", type=float, default=1.0, help="decoding before the prompt")
    flags.add_argument("--settle", type=int, default=16, help="first gaps of a stream left out")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--flag", action="append", default=[], help="another flag of the server")
    args = flags.parse_args()
    rows = measure(args)
    print(table(rows))
    record("longprompt", args, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
