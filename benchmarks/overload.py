"""Ten times more requests than the server can take: what becomes of its throughput.

First the peak: closed-loop clients that fill every place. Then an open loop of random arrivals
at a multiple of the peak's request rate. Goodput counts tokens of requests that were completed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from harness import Reply, body, complete, parser, percentile, random_prompt, record, session, table
from server import Server, memory_mib, serve, services


class Bodies:
    """Requests of one shape; no prompt comes twice."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._rng = random.Random(args.seed)
        self._args = args

    def next(self) -> bytes:
        prompt = random_prompt(self._rng, self._args.prompt_tokens)
        return body(prompt, self._args.output_tokens)


async def peak(server: Server, bodies: Bodies, clients: int, seconds: float) -> list[Reply]:
    """Closed loop: each client asks again as soon as it was answered."""
    replies: list[Reply] = []
    end = time.perf_counter() + seconds
    async with session() as http:

        async def client() -> None:
            while time.perf_counter() < end:
                replies.append(await complete(http, server.url, bodies.next()))

        await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def flood(
    server: Server, bodies: Bodies, rate: float, seconds: float, seed: int
) -> tuple[list[Reply], list[dict[str, float]]]:
    """Open loop: arrivals do not wait for answers. Also each second's memory."""
    rng = random.Random(seed)
    memory: list[dict[str, float]] = []
    pids = services(server.pid)
    tasks: set[asyncio.Task[None]] = set()
    replies: list[Reply] = []
    async with session() as http:

        async def one(data: bytes) -> None:
            replies.append(await complete(http, server.url, data))

        async def watch() -> None:
            while True:
                memory.append(memory_mib(pids))
                await asyncio.sleep(1.0)

        watcher = asyncio.create_task(watch())
        begin = time.perf_counter()
        due = 0.0
        while due < seconds:
            due += rng.expovariate(rate)
            ahead = begin + due - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            task = asyncio.create_task(one(bodies.next()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        watcher.cancel()
    return replies, memory


def summary(replies: list[Reply], begin: float, end: float) -> dict[str, float]:
    """Of the replies that ended between begin and end."""
    served = [r for r in replies if r.ok and begin <= r.ended <= end]
    refused = [r for r in replies if r.status == 429 and begin <= r.started <= end]
    other = [r for r in replies if not r.ok and r.status != 429]
    waits = [r.ended - r.started for r in refused]
    return {
        "requests_per_s": len(served) / (end - begin),
        "tokens_per_s": sum(r.num_tokens for r in served) / (end - begin),
        "ttft_p50_ms": 1e3 * percentile([r.ttft for r in served], 0.5),
        "ttft_p99_ms": 1e3 * percentile([r.ttft for r in served], 0.99),
        "refused_per_s": len(refused) / (end - begin),
        "refusal_p50_ms": 1e3 * percentile(waits, 0.5),
        "refusal_p99_ms": 1e3 * percentile(waits, 0.99),
        "without_retry_after": sum(r.retry_after_ms is None for r in refused),
        "other_errors": len(other),
    }


def growth(memory: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Resident MiB by service: mean of the second quarter, of the last, and the most."""
    quarter = max(len(memory) // 4, 1)
    found = {}
    for name in memory[0]:
        values = [sample.get(name, 0.0) for sample in memory]
        found[name] = {
            "second_quarter_mib": sum(values[quarter : 2 * quarter]) / quarter,
            "last_quarter_mib": sum(values[-quarter:]) / quarter,
            "most_mib": max(values),
        }
    return found


def used(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """Cores that each process kept busy."""
    return {name: (after[name] - before.get(name, 0.0)) / seconds for name in after}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    flags = [
        *("--max-num-seqs", str(args.seqs), "--max-waiting", str(args.waiting)),
        *("--kv-cache-memory-bytes", args.pool, *args.flag),
    ]
    rows: list[dict[str, Any]] = []
    cores: list[dict[str, Any]] = []
    with serve(args.model, *flags) as server:
        bodies = Bodies(args)
        clients = args.seqs + args.waiting // 2
        asyncio.run(peak(server, bodies, clients, args.peak_seconds / 4))  # warm-up
        cpu, begin = server.cpu_s(), time.perf_counter()
        replies = asyncio.run(peak(server, bodies, clients, args.peak_seconds))
        took = time.perf_counter() - begin
        rows.append({"load": "peak"} | summary(replies, begin, begin + args.peak_seconds))
        cores.append({"load": "peak"} | used(cpu, server.cpu_s(), took))
        rate = args.factor * rows[0]["requests_per_s"]
        print(f"peak {rows[0]['tokens_per_s']:.0f} tokens/s; now {rate:.0f} requests/s", flush=True)
        cpu, begin = server.cpu_s(), time.perf_counter()
        replies, memory = asyncio.run(flood(server, bodies, rate, args.seconds, args.seed))
        took = time.perf_counter() - begin
        late = max(r.started for r in replies) - begin - args.seconds
        steady = begin + args.ramp_seconds  # until then no request can have been completed
        rows.append({"load": f"{args.factor:g}x"} | summary(replies, steady, begin + args.seconds))
        cores.append({"load": f"{args.factor:g}x"} | used(cpu, server.cpu_s(), took))
        unread = server.metric("quire_requests_refused_early_total")
    goodput = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    print(table(rows), table(cores), sep="\n\n")
    print(table([{"service": k} | v for k, v in growth(memory).items()]))
    print(
        f"goodput at {args.factor:g}x: {goodput:.1%} of peak; {unread:.0f} refused unread; the "
        f"client was {max(late, 0.0):.2f} s late at the end"
    )
    return {
        "server": server.command, "rows": rows, "busy_cores": cores, "memory": growth(memory),
        "goodput_share": goodput, "refused_unread": unread,
    }  # fmt: skip


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--seqs", type=int, default=32, help="the server's --max-num-seqs")
    flags.add_argument("--waiting", type=int, default=32, help="the server's --max-waiting")
    flags.add_argument("--factor", type=float, default=10.0, help="multiple of the peak's rate")
    flags.add_argument("--seconds", type=float, default=60.0)
    flags.add_argument("--ramp-seconds", type=float, default=5.0, help="of those, not counted")
    flags.add_argument("--peak-seconds", type=float, default=20.0)
    flags.add_argument("--prompt-tokens", type=int, default=128)
    flags.add_argument("--output-tokens", type=int, default=64)
    pool = "KV memory; small, so that all of it is soon touched and what grows is a leak"
    flags.add_argument("--pool", default="64MiB", help=pool)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--flag", action="append", default=[], help="another flag of the server")
    args = flags.parse_args()
    result = measure(args)
    record("overload", args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
