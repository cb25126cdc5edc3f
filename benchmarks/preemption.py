"""Too little KV memory: preemption against admission control, on the same memory and work.

The pool holds a quarter of what the running requests come to need. One server lets all of them
run and preempts; the other runs no more at a time than are sure to fit. Same requests, same order.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from harness import body, complete, parser, percentile, random_prompt, record, session, table
from server import Server, serve


def workload(args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(prompt, output tokens) of each request; outputs vary by half."""
    rng = random.Random(args.seed)
    return [
        (
            random_prompt(rng, args.prompt_tokens),
            int(args.output_tokens * rng.uniform(0.5, 1.5)),
        )
        for _ in range(args.requests)
    ]


async def run_all(server: Server, work: list[tuple[list[int], int]]) -> dict[str, Any]:
    """All at once; raises unless each of them ends with all its tokens."""
    async with session() as http:
        begin = time.perf_counter()
        replies = await asyncio.gather(
            *(complete(http, server.url, body(prompt, n)) for prompt, n in work)
        )
        took = time.perf_counter() - begin
    for reply, (_, n) in zip(replies, work, strict=True):
        if not reply.ok or reply.num_tokens != n:
            raise RuntimeError(f"{reply.status}, {reply.num_tokens} of {n} tokens: {reply.error}")
    return {
        "tokens_per_s": sum(reply.num_tokens for reply in replies) / took,
        "seconds": took,
        "worst_gap_ms": 1e3 * max(max(reply.gaps, default=0.0) for reply in replies),
        "ttft_p50_ms": 1e3 * percentile([reply.ttft for reply in replies], 0.5),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    work = workload(args)
    most = max(-(-(len(prompt) + n) // args.block_size) for prompt, n in work)
    mean = sum(-(-(len(prompt) + n) // args.block_size) for prompt, n in work) / len(work)
    pool = max(int(args.seqs * mean / args.shortage), most) + 1
    needed = sum(len(prompt) + n - 1 for prompt, n in work)  # tokens computed once each
    rows = []
    for name, seqs in (("preemption", args.seqs), ("admission alone", max((pool - 1) // most, 1))):
        flags = [
            *("--max-num-seqs", str(seqs), "--num-gpu-blocks-override", str(pool)),
            *("--block-size", str(args.block_size), "--max-waiting", str(args.requests)),
            *args.flag,
        ]
        with serve(args.model, *flags) as server:
            asyncio.run(run_all(server, work[:1]))  # warm-up
            before = server.metric("quire_scheduled_tokens_total")
            row: dict[str, Any] = {"how": name, "max_num_seqs": seqs, "blocks": pool - 1}
            row |= asyncio.run(run_all(server, work[1:]))
            scheduled = server.metric("quire_scheduled_tokens_total") - before
            first = len(work[0][0]) + work[0][1] - 1
            row["preemptions"] = int(server.metric("quire_preemptions_total"))
            row["recomputed_%"] = 100 * (scheduled - (needed - first)) / scheduled
            row["blocks_left_used"] = int(server.metric("quire_kv_blocks_used"))
        rows.append(row)
    share = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    print(table(rows))
    print(f"every request ended; throughput with preemption: {share:.1%} of admission alone")
    return {"rows": rows, "share": share}


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--seqs", type=int, default=32, help="--max-num-seqs with preemption")
    flags.add_argument("--shortage", type=float, default=4.0)
    flags.add_argument("--requests", type=int, default=129, help="the first one is the warm-up")
    flags.add_argument("--prompt-tokens", type=int, default=64)
    flags.add_argument("--output-tokens", type=int, default=256, help="the mean; from half to 1.5x")
    flags.add_argument("--block-size", type=int, default=16)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--flag", action="append", default=[], help="another flag of both servers")
    args = flags.parse_args()
    result = measure(args)
    record("preemption", args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
