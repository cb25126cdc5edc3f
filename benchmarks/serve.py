"""Load an OpenAI server with streaming completions and print what its clients saw.

Knows nothing of Quire: any base URL does. One wave of C closed-loop clients per level;
prompts are random token ids (exact lengths, no shared prefix), outputs ignore EOS.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from harness import Reply, body, complete, percentile, random_prompt, session


async def level(args: argparse.Namespace, clients: int, rounds: int, seed: str) -> dict[str, float]:
    rng = random.Random(seed)  # one of its own, so that no prompt is met twice
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    async with session(args.timeout, headers=headers) as http:

        async def client() -> list[Reply]:
            replies = []
            for _ in range(rounds):
                prompt = random_prompt(rng, args.prompt_tokens, args.vocab)
                data = body(prompt, args.output_tokens, args.model, temperature=args.temperature)
                replies.append(await complete(http, args.base_url, data))
                if not replies[-1].ok:
                    raise RuntimeError(f"{replies[-1].status}: {replies[-1].error}")
            return replies

        start = time.perf_counter()
        waves = await asyncio.gather(*(client() for _ in range(clients)))
        elapsed = time.perf_counter() - start
    replies = [reply for wave in waves for reply in wave]
    gaps = [gap for reply in replies for gap in reply.gaps] or [0.0]
    ttfts = [reply.ttft for reply in replies]
    return {
        "clients": clients,
        "requests": len(replies),
        "tokens_per_s": sum(reply.num_tokens for reply in replies) / elapsed,
        "ttft_p50_ms": statistics.median(ttfts) * 1e3,
        "ttft_p99_ms": percentile(ttfts, 0.99) * 1e3,
        "itl_p50_ms": statistics.median(gaps) * 1e3,
        "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
        "itl_max_ms": max(gaps) * 1e3,
    }


async def run(args: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    for clients in args.clients:
        await level(args, clients, 1, f"warm-up {clients}")  # not counted
        rows.append(await level(args, clients, args.rounds, f"{clients}"))
        print("  ".join(f"{k} {v:.1f}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--vocab", type=int, default=500, help="prompt ids are below this")
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--note", default="", help="what was measured, kept in the JSON")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    rows = asyncio.run(run(args))
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "command": " ".join(sys.argv[1:]),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "note": args.note,
            "levels": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
