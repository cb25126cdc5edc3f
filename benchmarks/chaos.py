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
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import date
from pathlib import Path

from rig import (
    SERVICES,
    Body,
    Clients,
    Server,
    Tally,
    footprint,
    load,
    next_token,
    requests,
    session,
    undisturbed,
)

START_UP_S = 0.25  # no service comes back faster; tokens before were on their way
POISON = {"kill": [3, 1, 4, 1, 5, 9], "fail": [2, 7, 1, 8, 2, 8]}  # ids in a poisoned prompt


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
                    resumed.append(await next_token(clients, at, START_UP_S))
                    seen = [server.noticed(name, first) for name in names[-1:]]
                    noticed += [60.0 if s is None else s for s in seen]
                await end()
            answer = {
                "kills": killed,
                **tally.report(),
                "noticed_s": spread(noticed),
                "next_token_s": spread(resumed),
                "restarts": server.count("starting it again"),
            }
            in_time = max(noticed) < 1.0 * args.slack and max(resumed) <= limit * args.slack
            kept = tally.clean and in_time
            return {**answer, "kept": kept}


async def poison(args: argparse.Namespace) -> Body:
    """One request is made to kill the worker, one to fail its step; eight others must not care."""
    faults = ";".join(f"{kind}:{','.join(map(str, ids))}" for kind, ids in POISON.items())
    answer: Body = {"kept": True}
    with Server(args, QUIRE_TEST_FAULT=faults) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            bodies = long_streams(args)
            expected = await undisturbed(clients, bodies, args.clients)
            for kind, ids in POISON.items():
                begin = time.time()
                streams = [asyncio.create_task(clients.ask(body)) for body in bodies]
                await next_token(clients, begin)
                at = time.time()
                guilty: Body = {"model": "m", "prompt": [7, 8, *ids, 11], "max_tokens": 8}
                async with http.post(f"{server.url}/v1/completions", json=guilty) as response:
                    status, text = response.status, await response.text()
                    retry = response.headers.get("x-should-retry")
                took = time.time() - at
                tally = Tally()
                for body, want, stream in zip(bodies, expected, streams, strict=True):
                    tally.add(body, want, await stream)
                restarts = server.count("starting it again", at)
                alone = status == 500 and "request_crashed_worker" in text and retry == "false"
                answer[kind] = {
                    **tally.report(), "guilty_failed_alone": alone, "restarts": restarts,
                    "guilty_answered_s": round(took, 2),
                }  # fmt: skip
                if not alone:
                    answer[kind]["answer"] = f"{status} {retry} {text[:300]}"
                answer["kept"] &= alone and tally.clean and restarts <= 5
    return answer


def long_streams(args: argparse.Namespace) -> list[Body]:
    """One for each client, so long that what happens to the server happens meanwhile."""
    long = {"stream": True, "max_tokens": args.tokens, "n": 1, "stop": None}
    return [{**body, **long} for body in requests(args.clients, args.seed)]


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
                    awake = await next_token(clients, time.time())
                    paused = longest_pause(clients.arrivals, at)
                    await end()
                fine = tally.clean and (name == "gateway" or noticed <= 3.0 * args.slack)
                answer[name] = {
                    **tally.report(), "noticed_s": round(noticed, 2) if words else None,
                    "health": words,
                    "longest_pause_s": round(paused, 2), "token_after_wake_s": round(awake, 2),
                    "restarts": server.count("starting it again"),
                }  # fmt: skip
                answer["kept"] &= fine
    return answer


async def slow(args: argparse.Namespace) -> Body:
    """A step that takes long is no illness; a frozen worker is, within 3 s."""
    fault = f"slow={args.seconds:g}:" + ",".join(map(str, POISON["kill"]))
    with Server(args, QUIRE_TEST_FAULT=fault) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            body = {"model": "m", "prompt": POISON["kill"], "max_tokens": 2}
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
    for victim in args.services:
        bodies = long_streams(args)
        with Server(args) as server:
            async with session() as http:
                clients = Clients(http, server)
                await clients.ready()
                expected = await undisturbed(clients, bodies, args.clients)
                streams = [asyncio.create_task(clients.ask(body)) for body in bodies]
                await next_token(clients, time.time())
                process = server.processes["serve"]
                at = time.time()
                process.send_signal(signal.SIGTERM)
                while (await clients.get("/ready"))[0] == 200:
                    pass
                unready = time.time() - at
                if victim != "gateway":  # its streams would end with it
                    await asyncio.to_thread(server.kill, victim)
                newcomer = {"model": "m", "prompt": [1, 2], "max_tokens": 1}
                async with http.post(f"{server.url}/v1/completions", json=newcomer) as response:
                    refused = response.status == 503 and "Retry-After" in response.headers
                tally = Tally()
                for body, want, stream in zip(bodies, expected, streams, strict=True):
                    tally.add(body, want, await stream)
                status = await asyncio.to_thread(process.wait, 60)
                fine = tally.clean and refused and status == 0 and unready < 0.5 * args.slack
                answer["quiet" if victim == "gateway" else f"kill {victim}"] = {
                    **tally.report(), "unready_s": round(unready, 3), "newcomer_refused": refused,
                    "status": status, "took_s": round(time.time() - at, 2),
                }  # fmt: skip
                answer["kept"] &= fine
    return answer


async def cancel(args: argparse.Namespace) -> Body:
    """Clients that leave while they wait, prefill or decode; then everything is as before."""
    rng = random.Random(args.seed)
    # Few run, so that many wait; nothing is cached, so that every block is free in the end.
    environ = {"QUIRE_MAX_NUM_SEQS": "8", "QUIRE_ENABLE_PREFIX_CACHING": "false"}
    with Server(args, **environ) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            await undisturbed(clients, requests(6, args.seed))
            before = await clients.gauges()
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
                {**b, "max_tokens": 400, "prompt": b["prompt"] * rng.randrange(1, 6)}
                for b in requests(args.requests, args.seed)
            ]
            left = await asyncio.gather(*(one(b, rng.uniform(0, 0.3)) for b in bodies))
            at = time.time()
            gauges = await clients.gauges()
            while gauges != before and time.time() - at < 10:
                await asyncio.sleep(0.02)
                gauges = await clients.gauges()
            took = time.time() - at
            return {
                "requests": args.requests, "left": sum(left), "before": before, "after": gauges,
                "as_before_s": round(took, 2),
                "kept": len(gauges) > 3 and gauges == before and took < 1.0 * args.slack,
            }  # fmt: skip


async def flat(args: argparse.Namespace) -> Body:
    """Many requests: memory, descriptors and blocks as after the first tenth."""
    bodies = requests(args.requests, args.seed, max_tokens=24)
    # A prefix cache that is full after the first tenth: one that fills up would look like a leak.
    environ = {"QUIRE_KV_CACHE_MEMORY_BYTES": "16MiB"}
    with Server(args, **environ) as server:
        async with session() as http:
            clients = Clients(http, server)
            await clients.ready()
            warm = max(len(bodies) // 10, 200)
            await undisturbed(clients, bodies[:warm], args.clients)
            before = {n: footprint(pid) for n, pid in server.pids().items()}
            await undisturbed(clients, bodies[warm:], args.clients)
            gauges = await clients.gauges()
            held = {k: v for k, v in gauges.items() if not k.endswith(("cached", "free"))}
            after = {n: footprint(pid) for n, pid in server.pids().items()}
            grown = {n: after[n][0] - before[n][0] for n in before}
            mib = {n: round(g / 2**20, 1) for n, g in grown.items()}
            opened = {n: after[n][1] - before[n][1] for n in before}
            fine = all(g < max(0.1 * before[n][0], 24 << 20) for n, g in grown.items())
            return {
                "requests": len(bodies), "grown_mib": mib, "more_descriptors": opened,
                "gauges": gauges,
                "kept": fine and max(opened.values()) <= 4 and not any(held.values()),
            }  # fmt: skip


def longest_pause(arrivals: list[float], since: float) -> float:
    """Seconds without a token of anybody, from `since` on."""
    times = [since, *(at for at in arrivals if at >= since)]
    return max(b - a for a, b in zip(times, times[1:], strict=False))


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
    parser.add_argument("--tokens", type=int, default=600, help="a stream of poison and drain")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=float, default=3.0, help="longest wait before a kill, s")
    parser.add_argument("--seconds", type=float, help="of freeze (10) and slow (12)")
    parser.add_argument("--services", nargs="+", choices=SERVICES, default=list(SERVICES))
    parser.add_argument("--apart", action="store_true", help="freeze without a supervisor")
    parser.add_argument("--slack", type=float, default=1.0, help="factor on times that must hold")
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
