"""Kill, stop, poison and leave a running server; say what its clients saw.

    python benchmarks/chaos.py worker --kills 30      kill -9 of the worker at random moments
    python benchmarks/chaos.py scheduler --kills 15   of the scheduler
    python benchmarks/chaos.py both --kills 10        of both together
    python benchmarks/chaos.py poison                 a request that kills (or fails) its step
    python benchmarks/chaos.py freeze                 SIGSTOP for 10 s of each service
    python benchmarks/chaos.py freeze --apart         the same without a supervisor
    python benchmarks/chaos.py slow                   a step of 12 s is no illness
    python benchmarks/chaos.py drain                  SIGTERM under load, and a kill meanwhile
    python benchmarks/chaos.py cancel --requests 1000 clients that leave
    python benchmarks/chaos.py flat --requests 10000  memory, descriptors, blocks

Every answer is compared with that of an undisturbed run on the same server. Starts its own server
on free ports. Prints a table; the exit status is 0 when every promise was kept. Linux only (/proc).
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
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp

Body = dict[str, Any]
SERVICES = ("gateway", "scheduler", "worker")
# A line by which somebody says that the service is gone or stands still.
NOTICED = {
    "worker": re.compile(r"worker rank \d+ (closed|can't be reached|was silent|has not answered)"),
    "scheduler": re.compile(r"lost the scheduler"),
    "gateway": re.compile(r"gateway (was killed|ended|stands still)"),
}
START_UP_S = 0.25  # no service comes back faster; tokens before were on their way
POISON = [3, 1, 4, 1, 5, 9, 2, 6]  # token ids; a prompt that holds them is poisoned


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
        found = {}
        for pid in children(self.processes["serve"].pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            found.update({name: pid for name in SERVICES if name in words})
        return found

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


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            cells = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(cells[1]) == pid and cells[0] != "Z":
            found.append(int(stat.parent.name))
    return found


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
        """All samples of the page whose names tell of work at hand."""
        _, page = await self.get("/metrics")
        found = re.findall(r"^(\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", str(page), re.M)
        wanted = r"(running|waiting|in_flight|blocks_used|active)(_requests)?$"
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


async def next_token(clients: Clients, after: float, timeout_s: float = 60.0) -> float:
    """Seconds from `after` to the first text that a client gets from what came back."""
    seen = len(clients.arrivals)
    while time.time() - after < timeout_s:
        for at in clients.arrivals[seen:]:
            if at >= after + START_UP_S:
                return at - after
        seen = len(clients.arrivals)
        await asyncio.sleep(0.005)
    raise RuntimeError(f"no token in {timeout_s:g} s")


# -- what is done to the server -----------------------------------------------------------------
async def kills(args: argparse.Namespace, names: tuple[str, ...]) -> Body:
    """Kill -9 at random moments; every fifth time the replacement too, while it starts."""
    rng = random.Random(args.seed)
    limit = 6.0 if "worker" in names else 2.0
    bodies = requests(args.clients * args.requests, args.seed)
    with Server(args) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            expected = await undisturbed(clients, bodies, args.clients)
            noticed: list[float] = []
            resumed: list[float] = []
            with load(clients, bodies, expected, args.clients) as (tally, end):
                killed = 0
                while killed < args.kills:
                    await asyncio.sleep(rng.uniform(0.0, args.every))
                    at = await asyncio.to_thread(server.kill, *names)
                    killed += 1
                    first = at
                    if killed % 5 == 0 and killed < args.kills:
                        await asyncio.sleep(rng.uniform(0.2, 2.0))
                        at = await asyncio.to_thread(server.kill, *names)
                        killed += 1
                    resumed.append(await next_token(clients, at))
                    seen = [server.noticed(name, first) for name in names]
                    noticed += [60.0 if s is None else s for s in seen]
                await end()
            answer = {
                "kills": killed,
                **tally.report(),
                "noticed_s": spread(noticed),
                "next_token_s": spread(resumed),
                "restarts": server.count("starting it again"),
            }
            kept = tally.clean and max(noticed) < 1.0 and max(resumed) <= limit
            return {**answer, "kept": kept}


async def poison(args: argparse.Namespace) -> Body:
    """One request is made to kill the worker (or to fail its step); eight others must not care."""
    fault = ",".join(map(str, POISON))
    answer: Body = {"kept": True}
    for kind in ("kill", "fail"):
        with Server(args, QUIRE_TEST_FAULT=f"{kind}:{fault}") as server:
            async with session() as http:
                clients = Clients(http, server)
                await clients.ready()
                bodies = [
                    {**body, "stream": True, "max_tokens": 600, "n": 1, "stop": None}
                    for body in requests(args.clients, args.seed)
                ]
                expected = await undisturbed(clients, bodies, args.clients)
                streams = [asyncio.create_task(clients.ask(body)) for body in bodies]
                await asyncio.sleep(0.1)
                at = time.time()
                guilty: Body = {"model": "m", "prompt": [7, 8, *POISON, 11], "max_tokens": 8}
                async with http.post(f"{server.url}/v1/completions", json=guilty) as response:
                    status, text = response.status, await response.text()
                    retry = response.headers.get("x-should-retry")
                took = time.time() - at
                tally = Tally()
                for body, want, stream in zip(bodies, expected, streams, strict=True):
                    tally.add(body, want, await stream)
                restarts = server.count("starting it again")
                fine = status == 500 and "request_crashed_worker" in text and retry == "false"
                answer[kind] = {
                    **tally.report(), "guilty_failed_alone": fine, "restarts": restarts,
                    "guilty_answered_s": round(took, 2),
                }  # fmt: skip
                if not fine:
                    answer[kind]["answer"] = f"{status} {retry} {text[:300]}"
                answer["kept"] &= fine and tally.clean and restarts <= 5
                answer["kept"] &= (await clients.ask(bodies[0])) == expected[0]
    return answer


async def freeze(args: argparse.Namespace) -> Body:
    """SIGSTOP for some seconds of each service, while clients stream."""
    answer: Body = {"kept": True}
    bodies = requests(args.clients * 4, args.seed)
    for name in args.services:
        with Server(args) as server:
            async with session() as http:
                clients = Clients(http, server)
                await clients.ready()
                expected = await undisturbed(clients, bodies, args.clients)
                with load(clients, bodies, expected, args.clients) as (tally, end):
                    await asyncio.sleep(0.5)
                    pid = server.pids()[name]
                    at = await asyncio.to_thread(server.kill, name, number=signal.SIGSTOP)
                    noticed, words = 60.0, ""
                    while time.time() < at + args.seconds:
                        status, body = (0, {})
                        if name != "gateway":
                            status, body = await clients.get("/health")
                        if status == 503 and not words:
                            noticed, words = time.time() - at, body.get("problem", "")
                        await asyncio.sleep(0.05)
                    with suppress(ProcessLookupError):  # its supervisor has replaced it
                        os.kill(pid, signal.SIGCONT)
                    awake = await next_token(clients, time.time() - START_UP_S)
                    paused = longest_pause(clients.arrivals, at)
                    await end()
                fine = tally.clean and (name == "gateway" or noticed <= 3.0)
                answer[name] = {
                    **tally.report(), "noticed_s": round(noticed, 2), "health": words,
                    "longest_pause_s": round(paused, 2), "token_after_wake_s": round(awake, 2),
                    "restarts": server.count("starting it again"),
                }  # fmt: skip
                answer["kept"] &= fine
    return answer


async def slow(args: argparse.Namespace) -> Body:
    """A step that takes long is no illness; a frozen worker is, within 3 s."""
    fault = f"slow={args.seconds:g}:" + ",".join(map(str, POISON))
    with Server(args, QUIRE_TEST_FAULT=fault) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            body = {"model": "m", "prompt": POISON, "max_tokens": 2}
            asked = asyncio.create_task(clients.ask(body))
            begin, statuses = time.time(), []
            while not asked.done():
                statuses.append(await clients.get("/health"))
                await asyncio.sleep(0.1)
            took, answer = time.time() - begin, asked.result()
            sick = [s for s in statuses if s[0] != 200]
            fine = not sick and took >= args.seconds and not isinstance(answer, str)
            return {
                "step_s": round(took, 2), "looked": len(statuses), "unhealthy": len(sick),
                "examples": sick[:3], "restarts": server.count("starting it again"), "kept": fine,
            }  # fmt: skip


async def drain(args: argparse.Namespace) -> Body:
    """SIGTERM under load: what runs ends, also when a worker is killed meanwhile."""
    answer: Body = {"kept": True}
    for victim in (None, "worker", "scheduler"):
        bodies = [
            {**body, "stream": True, "max_tokens": 800, "n": 1, "stop": None}
            for body in requests(args.clients, args.seed)
        ]
        with Server(args) as server:
            async with session() as http:
                clients = Clients(http, server)
                await clients.ready()
                expected = await undisturbed(clients, bodies, args.clients)
                streams = [asyncio.create_task(clients.ask(body)) for body in bodies]
                await next_token(clients, time.time() - START_UP_S)
                process = server.processes["serve"]
                at = time.time()
                process.send_signal(signal.SIGTERM)
                while (await clients.get("/ready"))[0] == 200:
                    pass
                unready = time.time() - at
                if victim:
                    await asyncio.to_thread(server.kill, victim)
                newcomer = {"model": "m", "prompt": [1, 2], "max_tokens": 1}
                async with http.post(f"{server.url}/v1/completions", json=newcomer) as response:
                    refused = response.status == 503 and "Retry-After" in response.headers
                tally = Tally()
                for body, want, stream in zip(bodies, expected, streams, strict=True):
                    tally.add(body, want, await stream)
                status = await asyncio.to_thread(process.wait, 60)
                fine = tally.clean and refused and status == 0 and unready < 0.5
                answer[f"kill {victim}" if victim else "quiet"] = {
                    **tally.report(), "unready_s": round(unready, 3), "newcomer_refused": refused,
                    "status": status, "took_s": round(time.time() - at, 2),
                }  # fmt: skip
                answer["kept"] &= fine
    return answer


async def cancel(args: argparse.Namespace) -> Body:
    """Clients that leave while they wait, prefill or decode; then everything is as before."""
    rng = random.Random(args.seed)
    with Server(args, QUIRE_MAX_NUM_SEQS="8") as server:  # so that most of them wait
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            await clients.ask(requests(1, args.seed)[0])
            turn = asyncio.Semaphore(48)

            async def one(body: Body, patience: float) -> bool:
                async with turn:
                    try:
                        async with asyncio.timeout(patience):
                            await clients.ask(body)
                    except TimeoutError:
                        return True
                    return False

            bodies = [
                {**b, "max_tokens": 2000, "prompt": b["prompt"] * rng.randrange(1, 8)}
                for b in requests(args.requests, args.seed)
            ]
            left = await asyncio.gather(*(one(b, rng.uniform(0, 0.5)) for b in bodies))
            at = time.time()
            gauges = await clients.gauges()
            while any(gauges.values()) and time.time() - at < 10:
                await asyncio.sleep(0.02)
                gauges = await clients.gauges()
            took = time.time() - at
            return {
                "requests": args.requests, "left": sum(left), "gauges": gauges,
                "all_zero_s": round(took, 2),
                "kept": bool(gauges) and not any(gauges.values()) and took < 1.0,
            }  # fmt: skip


async def flat(args: argparse.Namespace) -> Body:
    """Many requests: memory, descriptors and blocks as after the first tenth."""
    bodies = requests(args.requests, args.seed, max_tokens=24)
    with Server(args) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            warm = max(len(bodies) // 10, 64)
            await undisturbed(clients, bodies[:warm], args.clients)
            before = {n: footprint(pid) for n, pid in server.pids().items()}
            await undisturbed(clients, bodies[warm:], args.clients)
            gauges = await clients.gauges()
            after = {n: footprint(pid) for n, pid in server.pids().items()}
            grown = {n: after[n][0] - before[n][0] for n in before}
            mib = {n: round(g / 2**20, 1) for n, g in grown.items()}
            opened = {n: after[n][1] - before[n][1] for n in before}
            fine = all(g < max(0.1 * before[n][0], 24 << 20) for n, g in grown.items())
            return {
                "requests": len(bodies), "grown_mib": mib, "more_descriptors": opened,
                "gauges": gauges,
                "kept": fine and max(opened.values()) <= 4 and not any(gauges.values()),
            }  # fmt: skip


def footprint(pid: int) -> tuple[int, int]:
    """Resident bytes, open descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def longest_pause(arrivals: list[float], since: float) -> float:
    """Seconds without a token of anybody, from `since` on."""
    times = [since, *(at for at in arrivals if at >= since)]
    return max(b - a for a, b in zip(times, times[1:], strict=False))


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180), connector=connector)


def spread(values: list[float]) -> Body:
    ordered = sorted(values)
    return {"p50": round(ordered[len(ordered) // 2], 3), "max": round(ordered[-1], 3)}


# -- the command --------------------------------------------------------------------------------
MODES: dict[str, Callable[[argparse.Namespace], Awaitable[Body]]] = {
    "worker": lambda args: kills(args, ("worker",)),
    "scheduler": lambda args: kills(args, ("scheduler",)),
    "both": lambda args: kills(args, ("worker", "scheduler")),
    "poison": poison,
    "freeze": freeze,
    "slow": slow,
    "drain": drain,
    "cancel": cancel,
    "flat": flat,
}
REQUESTS = {"cancel": 1000, "flat": 10_000}  # in all; elsewhere 50 a client


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, help="a client; of cancel and flat: in all")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=float, default=3.0, help="longest wait before a kill, s")
    parser.add_argument("--seconds", type=float, help="of freeze (10) and slow (12)")
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=list(SERVICES))
    parser.add_argument("--apart", action="store_true", help="freeze without a supervisor")
    parser.add_argument("--seed", default="chaos")
    parser.add_argument("--json", metavar="FILE", help="write the report here too")
    args = parser.parse_args()
    args.requests = args.requests or REQUESTS.get(args.mode, 50)
    args.seconds = args.seconds or (12.0 if args.mode == "slow" else 10.0)
    begin = time.time()
    found = asyncio.run(MODES[args.mode](args))
    report = {
        "mode": args.mode, "date": str(date.today()), "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "model": args.model,
        "took_s": round(time.time() - begin, 1), **found,
    }  # fmt: skip
    for name, value in report.items():
        print(f"{name:18} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
