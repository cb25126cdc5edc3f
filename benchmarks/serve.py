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
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import aiohttp


@dataclass(frozen=True)
class Sample:
    """What one request saw, in seconds."""

    ttft: float
    gaps: list[float]  # between streamed pieces
    total: float
    num_tokens: int  # by the server's usage


async def one_request(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> Sample:
    start = time.perf_counter()
    arrivals: list[float] = []
    usage = 0
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
            if event["choices"]:
                arrivals.append(time.perf_counter())
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    return Sample(arrivals[0] - start, gaps, arrivals[-1] - start, usage)


async def level(args: argparse.Namespace, clients: int, rounds: int, seed: str) -> dict[str, float]:
    rng = random.Random(seed)  # one of its own, so that no prompt is met twice
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers
    ) as session:

        async def client() -> list[Sample]:
            samples = []
            for _ in range(rounds):
                body: dict[str, object] = {
                    "model": args.model,
                    "prompt": [rng.randrange(args.vocab) for _ in range(args.prompt_tokens)],
                    "max_tokens": args.output_tokens,
                    "temperature": args.temperature,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                samples.append(await one_request(session, args.base_url + "/v1/completions", body))
            return samples

        start = time.perf_counter()
        waves = await asyncio.gather(*(client() for _ in range(clients)))
        elapsed = time.perf_counter() - start
    samples = [sample for wave in waves for sample in wave]
    gaps = sorted(gap for sample in samples for gap in sample.gaps) or [0.0]
    ttfts = sorted(sample.ttft for sample in samples)
    return {
        "clients": clients,
        "requests": len(samples),
        "tokens_per_s": sum(s.num_tokens for s in samples) / elapsed,
        "ttft_p50_ms": statistics.median(ttfts) * 1e3,
        "ttft_p99_ms": ttfts[int(len(ttfts) * 0.99)] * 1e3,
        "itl_p50_ms": statistics.median(gaps) * 1e3,
        "itl_p99_ms": gaps[int(len(gaps) * 0.99)] * 1e3,
        "itl_max_ms": gaps[-1] * 1e3,
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
