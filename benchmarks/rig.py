"""What chaos.py is made of: a server to be hurt, clients that keep what they got.

Starts `quire serve` (or the services apart) on free ports; sends requests whose answers do not
depend on what else runs. Knows no kind of harm. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from server import free_ports, services

Body = dict[str, Any]
SERVICES = ("gateway", "scheduler", "worker")
# A line by which somebody says that the service is gone or stands still.
NOTICED = {
    "worker": re.compile(r"worker rank \d+ (closed|can't be reached|was silent|has not answered)"),
    "scheduler": re.compile(r"lost the scheduler"),
    "gateway": re.compile(r"gateway (was killed|ended|stands still)"),
}
PATIENCE_S = 60.0


def footprint(pid: int) -> tuple[int, int]:
    """Resident bytes, open descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


# -- the server ---------------------------------------------------------------------------------
class Server:
    """`quire serve`, or the three services apart, on free ports. Lines carry their arrival time."""

    def __init__(self, args: argparse.Namespace, **environ: str) -> None:
        ports = free_ports(5)
        self.port = ports[0]
        names = ("PORT", "ENGINE_ADDRESS", "STEP_ADDRESS", "SCHEDULER_METRICS_PORT")
        values = (f"{ports[0]}", f"127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[2]}", f"{ports[3]}")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        self.environ = {
            **kept,
            **{f"QUIRE_{k}": v for k, v in zip(names, values, strict=True)},
            "QUIRE_WORKER_METRICS_PORT": f"{ports[4]}",
            "QUIRE_MODEL": args.model,
            "QUIRE_SERVED_MODEL_NAME": "m",
            **environ,
        }
        self.apart = bool(getattr(args, "apart", False))
        self.lines: list[tuple[float, str]] = []
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Server:
        for name in SERVICES if self.apart else ("serve",):
            self.processes[name] = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "quire.cli", name],
                env=self.environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pids(self) -> dict[str, int]:
        """Running services by name."""
        if self.apart:
            return {n: p.pid for n, p in self.processes.items() if p.poll() is None}
        return services(self.processes["serve"].pid)

    def kill(self, *names: str, number: signal.Signals = signal.SIGKILL) -> float:
        """Signal these services; the time of it. Waits for one that is not there."""
        while True:
            pids = self.pids()
            if all(name in pids for name in names):
                break
            time.sleep(0.002)
        now = time.time()
        for name in names:
            os.kill(pids[name], number)
        return now

    def noticed(self, name: str, since: float) -> float | None:
        """Seconds from `since` to the first line that tells of it."""
        for at, line in list(self.lines):
            if at >= since and NOTICED[name].search(line):
                return at - since
        return None

    def count(self, pattern: str, since: float = 0.0) -> int:
        return sum(1 for at, line in list(self.lines) if at >= since and re.search(pattern, line))


# -- clients ------------------------------------------------------------------------------------
@dataclass
class Clients:
    """Sends requests and keeps what came back. `arrivals`: times at which text came, of all."""

    session: aiohttp.ClientSession
    server: Server
    arrivals: list[float] = field(default_factory=list)

    async def ask(self, body: Body) -> Any:
        """What the client has in the end: (text, finish reason, log-probabilities) by choice, or
        the error as text."""
        url = f"{self.server.url}/v1/completions"
        try:
            async with self.session.post(url, json=body) as response:
                if response.status != 200:
                    return f"{response.status}: {(await response.text())[:300]}"
                if not body.get("stream"):
                    answer = await response.json()
                    self.arrivals.append(time.time())
                    return [_choice(c) for c in answer["choices"]]
                return await self._read(response, body.get("n", 1))
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"

    async def _read(self, response: aiohttp.ClientResponse, count: int) -> Any:
        whole: list[list[Any]] = [["", None, []] for _ in range(count)]
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                return [tuple(c) for c in whole]
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return f"error event: {json.dumps(event['error'])}"
            for part in event["choices"]:
                self.arrivals.append(time.time())
                mine, (text, reason, logprobs) = whole[part["index"]], _choice(part)
                mine[0] += text
                mine[1] = reason or mine[1]
                mine[2] += logprobs
        return "the stream was cut"

    async def get(self, path: str) -> tuple[int, Any]:
        """(0, '') when nobody answers."""
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self.session.get(self.server.url + path, timeout=timeout) as response:
                text = await response.text()
                return response.status, json.loads(text) if text.startswith("{") else text
        except (aiohttp.ClientError, TimeoutError):
            return 0, ""

    async def ready(self) -> None:
        """Wait until the server is ready; raise when it ends instead."""
        while (await self.get("/ready"))[0] != 200:
            for process in self.server.processes.values():
                if process.poll() is not None:
                    raise RuntimeError("\n".join(line for _, line in self.server.lines))
            await asyncio.sleep(0.02)

    async def gauges(self) -> dict[str, float]:
        """Samples of the page that tell of work at hand, and of blocks."""
        _, page = await self.get("/metrics")
        found = re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", str(page), re.M)
        wanted = r"requests_(running|waiting|in_flight)$|kv_blocks_(used|free|cached)$"
        return {name: float(value) for name, value in found if re.search(wanted, name)}


def _choice(choice: Body) -> tuple[str, str | None, list[Any]]:
    logprobs = choice.get("logprobs") or {}
    pairs = zip(logprobs.get("tokens", ()), logprobs.get("token_logprobs", ()), strict=True)
    return choice["text"], choice.get("finish_reason"), [list(p) for p in pairs]


def requests(count: int, seed: str, max_tokens: int = 160) -> list[Body]:
    """Greedy, seeded, n = 2, stop strings, log-probabilities; streamed and whole."""
    rng = random.Random(seed)
    kinds: list[Body] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.8, "stop": [" the", " was a"], "ignore_eos": False},
        {"temperature": 0.7, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0, "stop": [" and then"], "n": 2},
    ]
    return [
        {
            "model": "m",
            "prompt": [rng.randrange(10, 400) for _ in range(rng.randrange(4, 120))],
            "max_tokens": rng.randrange(max_tokens // 4, max_tokens),
            "seed": rng.randrange(1 << 40),
            "ignore_eos": True,
            "stream": rng.random() < 0.75,
            **kinds[i % len(kinds)],
        }
        for i in range(count)
    ]


async def undisturbed(clients: Clients, bodies: list[Body], width: int = 8) -> list[Any]:
    """The answers, `width` at a time. Raises RuntimeError when one fails."""
    turn = asyncio.Semaphore(width)

    async def one(body: Body) -> Any:
        async with turn:
            return await clients.ask(body)

    answers = await asyncio.gather(*(one(body) for body in bodies))
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(f"failed without any disturbance: {answer}")
    return answers


@dataclass
class Tally:
    """What became of the requests."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def add(self, body: Body, expected: Any, answer: Any) -> None:
        self.done += 1
        if isinstance(answer, str):
            self.failed.append(answer[:200])
        elif answer != expected:
            self.differing.append(f"{body}: {expected} became {answer}"[:2000])

    def report(self) -> Body:
        return {
            "requests": self.done,
            "failed": len(self.failed),
            "differing": len(self.differing),
            "examples": (self.failed + self.differing)[:3],
        }

    @property
    def clean(self) -> bool:
        return not self.failed and not self.differing


@contextmanager
def load(clients: Clients, bodies: list[Body], expected: list[Any], width: int) -> Iterator[Any]:
    """Clients that go through `bodies` again and again. Yields (tally, end): await end() lets
    each of them stop once all have been answered."""
    tally, ending = Tally(), asyncio.Event()

    async def one(first: int) -> None:
        turn = 0
        while True:
            for i in range(first, len(bodies), width):
                tally.add(bodies[i], expected[i], await clients.ask(bodies[i]))
                if ending.is_set() and turn:
                    return
            turn += 1
            if ending.is_set():
                return

    tasks = [asyncio.create_task(one(i)) for i in range(width)]

    async def end() -> None:
        ending.set()
        await asyncio.gather(*tasks)

    try:
        yield tally, end
    finally:
        for task in tasks:
            task.cancel()


async def next_token(clients: Clients, after: float, not_before: float = 0.0) -> float:
    """Seconds from `after` to the first text that a client gets, `not_before` so many seconds."""
    seen = len(clients.arrivals)
    while time.time() - after < PATIENCE_S:
        for at in clients.arrivals[seen:]:
            if at >= after + not_before:
                return at - after
        seen = len(clients.arrivals)
        await asyncio.sleep(0.005)
    raise RuntimeError(f"no token in {PATIENCE_S:g} s")


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180), connector=connector)
