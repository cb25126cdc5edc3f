"""What the load benchmarks share: streamed requests, percentiles, the record of a run.

Clients run on the cores of the server they measure, so a stream is read as bytes: events are
counted, only the last one is looked into.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from server import ROOT

RESULTS = ROOT / "benchmarks" / "results"
START_TIMEOUT_S = 300.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PIECE = re.compile(rb'"choices": ?\[\{')
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')


# -- requests -------------------------------------------------------------------------------
@dataclass
class Reply:
    """What one request saw; times are seconds of time.perf_counter()."""

    status: int = 0
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each event that is not the last
    num_tokens: int = 0  # by the server's usage
    num_cached_tokens: int = 0
    retry_after_ms: int | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def session(timeout_s: float = 3600.0, **options: Any) -> aiohttp.ClientSession:
    """A client without a limit of connections."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        **options,
    )


def body(prompt: Sequence[int] | str, max_tokens: int, model: str = "m", **fields: Any) -> bytes:
    """A streamed completion that runs to max_tokens."""
    values = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(values | fields).encode()


async def complete(
    http: aiohttp.ClientSession, url: str, data: bytes, reply: Reply | None = None
) -> Reply:
    """POST a streamed completion and read it to its end. `reply` is filled on the way, for who
    means to cancel this."""
    reply = reply or Reply()
    reply.started = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with http.post(f"{url}/v1/completions", data=data, headers=headers) as response:
        reply.status = response.status
        if response.status != 200:
            wait = response.headers.get("retry-after-ms")
            reply.retry_after_ms = int(wait) if wait else None
            reply.error = (await response.text())[:300]
        else:
            rest = tail = b""
            async for chunk in response.content.iter_any():
                events, end, rest = (rest + chunk).rpartition(b"\n\n")
                reply.arrivals += [time.perf_counter()] * len(_PIECE.findall(events))
                tail = (tail + events + end)[-2048:]
            usage, cached = _USAGE.search(tail), _CACHED.search(tail)
            reply.num_tokens = int(usage[1]) if usage else 0
            reply.num_cached_tokens = int(cached[1]) if cached else 0
            if not tail.endswith(b"data: [DONE]\n\n"):
                reply.error = tail[-300:].decode(errors="replace") or "it ended without an answer"
    reply.ended = time.perf_counter()
    return reply


def random_prompt(rng: random.Random, num_tokens: int, vocab: int = 500) -> list[int]:
    """Token ids that share no prefix with others."""
    return [rng.randrange(3, vocab) for _ in range(num_tokens)]


# -- the record -----------------------------------------------------------------------------
def percentile(values: Sequence[float], share: float) -> float:
    """0 <= share <= 1; nan for no values."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def parser(description: str | None, model: str | None = "demo") -> argparse.ArgumentParser:
    """Flags that all benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    if model is not None:
        found.add_argument("--model", default=model)
    found.add_argument("--note", default="", help="kept in the JSON")
    found.add_argument("--save", action="store_true", help="write JSON to benchmarks/results/")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys, aligned."""
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    widths = [max(len(h), *(len(c[i]) for c in cells)) for i, h in enumerate(heads)]
    lines = ["  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))]
    lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def record(name: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """With --save, write the result with what it takes to repeat it."""
    if not args.save:
        return
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.processor() or platform.machine()}, {cores} cores"
    path = RESULTS / f"{date.today().isoformat()}-{cores}core-{name}.json"
    value = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "machine": machine,
        "python": platform.python_version(),
        "torch": version("torch"),
        "note": args.note,
        **result,
    }
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
