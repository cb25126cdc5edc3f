"""Record a mixed load on a real server, then replay its journal: the figures of both.

Starts `quire serve` with --journal, loads it for --seconds (greedy, seeded, n = 2, stop strings,
shared prefixes, clients that go away, and with --kills a worker killed now and then), stops it,
and runs `quire replay`. The exit status is the replay's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import aiohttp
from server import Server, serve, services

QUIRE = [sys.executable, "-P", "-m", "quire.cli"]
OPENINGS = ("Once upon a time", "There was a little", "One day a boy", "In the dark wood")


def body(rng: random.Random) -> dict[str, object]:
    """One request of the mix."""
    seen = " ".join(["and then they went on"] * rng.randrange(12))
    request: dict[str, object] = {
        "model": "m", "prompt": f"{seen} {rng.choice(OPENINGS)}", "stream": True,
        "max_tokens": rng.randrange(8, 120), "temperature": rng.choice((0, 0.7, 1)),
        "seed": rng.randrange(1 << 32), "stream_options": {"include_usage": True},
    }  # fmt: skip
    if rng.random() < 0.2:
        request["n"] = 2
    if rng.random() < 0.2:
        request["stop"] = [" the", "."]
    if rng.random() < 0.2:
        request["logprobs"] = 3
    return request


async def client(url: str, seed: str, until: float, counts: Counter[str]) -> None:
    """Requests one after the other until the time is up; a tenth of them are cut off."""
    rng = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while time.monotonic() < until:
            leave_after = rng.randrange(2, 20) if rng.random() < 0.1 else 0
            async with session.post(f"{url}/v1/completions", json=body(rng)) as response:
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
                events = 0
                async for line in response.content:
                    events += line.startswith(b"data: {")
                    if b'"error"' in line[:20]:
                        raise RuntimeError(line.decode())
                    if leave_after and events >= leave_after:
                        break
            counts["cancelled" if leave_after else "complete"] += 1


async def load(server: Server, args: argparse.Namespace) -> Counter[str]:
    counts: Counter[str] = Counter()
    until = time.monotonic() + args.seconds
    jobs = [client(server.url, f"client {n}", until, counts) for n in range(args.clients)]

    async def kill() -> None:
        for _ in range(args.kills):
            await asyncio.sleep(args.seconds / (args.kills + 1))
            os.kill(services(server.pid)["worker"], signal.SIGKILL)
            counts["kills"] += 1

    await asyncio.gather(kill(), *jobs)
    return counts


def record(args: argparse.Namespace, folder: Path) -> Counter[str]:
    """Serve, load, stop."""
    flags = ("--journal", str(folder), "--journal-max-bytes", args.journal_max_bytes)
    with serve(args.model, *flags, "--log-level", "warning") as server:
        return asyncio.run(load(server, args))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=0, help="of the worker, evenly spread")
    parser.add_argument("--journal", type=Path, help="keep the journal here")
    parser.add_argument("--journal-max-bytes", default="1GiB")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.journal or Path(scratch) / "journal"
        counts = record(args, folder)
        files = sorted(folder.glob("journal-*.qj"))
        size = sum(path.stat().st_size for path in files)
        begin = time.monotonic()
        done = subprocess.run(
            [*QUIRE, "replay", str(folder), "--model", args.model],
            stdout=subprocess.PIPE,
            text=True,
        )
        took = time.monotonic() - begin
    said = done.stdout.strip()
    found = re.search(r"([\d,]+) steps, ([\d,]+) tokens", said)
    steps, tokens = (int(n.replace(",", "")) for n in found.groups()) if found else (0, 0)
    result = {
        "requests": dict(counts), "segments": len(files), "journal_bytes": size,
        "bytes_per_step": round(size / max(steps, 1)), "steps": steps, "tokens": tokens,
        "recorded_s": args.seconds, "replayed_s": round(took, 1), "replay": said.splitlines(),
        "exit_status": done.returncode,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        about = {
            "date": date.today().isoformat(), "command": " ".join(sys.argv[1:]),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }  # fmt: skip
        args.json.write_text(json.dumps(about | result, indent=1) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
