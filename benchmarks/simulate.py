"""How well does a simulation predict a real run? The same open-loop trace, measured and simulated.

Starts a real server with a journal, sends it a calibration trace and measures at the client; makes
a latency table of that journal, with the way to the client measured beside it; then, `--rounds`
times: sends the server another trace, simulates that trace, and compares. Prints both and the
relative errors, and the median of the rounds. `--scale N` simulates N workers instead and reports
steps a second.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from server import serve

from quire.config import resolve
from quire.latency_table import SPREADS, LatencyTable, spread
from quire.simulation import recorded
from quire.simulation.generate import Vocabulary, generate
from quire.simulation.ledger import percentiles
from quire.simulation.run import simulate
from quire.simulation.trace import Arrival
from quire_worker.simulated.tokens import oracle

FIGURES = ("ttft_ms", "itl_ms")
PLACES = ("p50", "p99")


@dataclass
class Seen:
    """One request at the client. Times on CLOCK_MONOTONIC, in seconds, as the journal has them."""

    number: int
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)


# -- the real run -------------------------------------------------------------------------------
def recording(journal: Path) -> tuple[str, ...]:
    return ("--journal", str(journal), "--log-level", "warning")


async def replay(url: str, arrivals: Sequence[Arrival]) -> list[Seen]:
    """Send each request at its time, whatever the server does; what the client saw."""
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.monotonic() + 0.2

        async def one(number: int, arrival: Arrival) -> Seen:
            await asyncio.sleep(max(begin + arrival.arrival_s - time.monotonic(), 0))
            body = {
                "model": "m",
                "prompt": list(arrival.prompt_token_ids),
                "max_tokens": arrival.num_output_tokens,
                "temperature": 1.0,
                "seed": number,
                "ignore_eos": True,
                "stream": True,
            }
            seen = Seen(number, time.monotonic())
            async with session.post(url + "/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
                async for line in response.content:
                    if line.startswith(b"data: {") and b'"choices":[{' in line:
                        seen.pieces.append(time.monotonic())
            return seen

        return list(await asyncio.gather(*(one(i, a) for i, a in enumerate(arrivals))))


def measured(seen: Sequence[Seen]) -> dict[str, dict[str, float]]:
    """Percentiles in ms, as the simulation reports them."""
    ttft = np.array([s.pieces[0] - s.sent for s in seen if s.pieces])
    gaps = np.concatenate([np.diff(s.pieces) for s in seen])
    whole = np.array([s.pieces[-1] - s.sent for s in seen if s.pieces])
    return {"ttft_ms": percentiles(ttft), "itl_ms": percentiles(gaps), "e2e_ms": percentiles(whole)}


# -- the table ----------------------------------------------------------------------------------
def calibrated(journal: str, seen: Sequence[Seen], arrivals: Sequence[Arrival]) -> LatencyTable:
    """The journal's table, with the way from and to the client: told by requests whose prompts
    (all different) tie the two clocks' events together."""
    table = recorded.from_journal(journal)
    arrived: dict[bytes, float] = {}  # prompt -> when the scheduler had it
    slots: dict[int, bytes] = {}
    came: dict[bytes, list[tuple[float, int]]] = defaultdict(list)  # (result there, row in step)
    for frame in recorded.frames(journal):
        now = frame.at_ns / 1e9
        if frame.plan is not None:
            for admit in frame.plan.admit:
                prompt = admit.prompt_token_ids
                slots[admit.slot] = prompt
                arrived.setdefault(prompt, now - admit.waited_micros * 1e-6)
        elif frame.worker is not None and frame.worker.HasField("result"):
            result = frame.worker.result
            counts = np.frombuffer(result.num_outputs, np.uint8).tolist()
            rows = np.frombuffer(result.slots, "<i4").tolist()
            row = 0
            for slot, count in zip(rows, counts, strict=True):
                if count and slot in slots:
                    came[slots[slot]].append((now, row))
                    row += 1
    submits, delays, places = [], [], []
    for one in seen:
        prompt = np.array(arrivals[one.number].prompt_token_ids, "<i4").tobytes()
        if prompt in arrived:
            submits.append(max(arrived[prompt] - one.sent, 0.0))
        if len(came[prompt]) == len(one.pieces):  # else pieces were merged
            before = 0.0
            for (there, row), piece in zip(came[prompt], one.pieces, strict=True):
                if there > before:  # else it only waited behind the piece before it
                    delays.append(1e6 * (piece - there))
                    places.append(row)
                before = piece
    if not submits or not delays:
        raise RuntimeError("the journal holds none of the calibration's requests")
    each = _per_row(np.array(delays), np.array(places))
    return dataclasses.replace(
        table,
        submit_micros=spread([1e6 * s for s in submits]),
        deliver_micros=spread([d - each * p for d, p in zip(delays, places, strict=True)]),
        deliver_row_micros=int(each),
    ).check()


def _per_row(delays: Any, places: Any) -> float:
    """What each row before it in its step delays a token, in microseconds: by medians, for a
    client that slept now and then would bend a fitted line."""
    first = delays[places == 0]
    slopes = [
        (np.median(delays[places == place]) - np.median(first)) / place
        for place in range(1, int(places.max()) + 1)
        if len(first) >= 20 and (places == place).sum() >= 20
    ]
    return max(float(np.median(slopes)), 0.0) if slopes else 0.0


def vocabulary(table: LatencyTable) -> Vocabulary:
    def answer(prompt: Any, number: int, count: int) -> Any:
        tokens, _ = oracle(
            prompt.tolist(), seed=number, max_tokens=count, vocab_size=table.vocab_size,
            max_model_len=table.max_model_len, ignore_eos=True,
        )  # fmt: skip
        return np.array(tokens, np.int32)

    return Vocabulary(table.vocab_size, table.max_model_len, answer)


# -- the comparison -----------------------------------------------------------------------------
def compare(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    from quire.config import split_flags

    config = resolve(split_flags(words)[0], {}).config
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "calibration"
        sizes = LatencyTable.constant(1.0, vocab_size=args.vocab, max_model_len=args.context)
        spec = args.calibration
        with serve(args.model, *recording(first), *words) as server:
            url = server.url
            asyncio.run(replay(url, _calls(sizes, "poisson:rate=5,requests=10", 99)))
            calls = _calls(sizes, spec, 1)
            seen = asyncio.run(replay(url, calls))
        table = calibrated(str(first), seen, calls)
        print(
            f"table: {len(table.points)} steps; medians in us:",
            *(f"{name} {statistics.median(getattr(table, name)):.0f}" for name in SPREADS),
            f"deliver_row_micros {table.deliver_row_micros}",
        )
        if args.table:
            args.table.write_text(table.to_json())
        rounds = []
        for number in range(args.rounds):
            journal = Path(folder) / f"run-{number}"
            with serve(args.model, *recording(journal), *words) as server:
                url = server.url
                asyncio.run(replay(url, _calls(sizes, "poisson:requests=10", 98)))
                calls = _calls(sizes, args.trace, 100 + number)
                real = measured(asyncio.run(replay(url, calls)))
            outcome = simulate(calls, table, config, seed=number)
            rounds.append(_round(number, real, outcome.report))
    return {"rounds": rounds, "errors": _medians(rounds)}


def _calls(table: LatencyTable, spec: str, seed: int) -> list[Arrival]:
    return generate(spec, vocabulary(table), seed)


def _round(number: int, real: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"real": real, "simulated": {k: told[k] for k in real}, "errors": {}}
    for figure in FIGURES:
        for place in PLACES:
            a, b = real[figure][place], told[figure][place]
            error = b / a - 1 if a else 0.0
            found["errors"][f"{figure}.{place}"] = error
            print(
                f"round {number}  {figure:<8} {place}  real {a:9.2f}  simulated {b:9.2f}  "
                f"{100 * error:+6.1f} %",
                flush=True,
            )
    return found


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    medians = {}
    for name in rounds[0]["errors"]:
        medians[name] = statistics.median(abs(r["errors"][name]) for r in rounds)
        print(f"median |error|  {name:<14} {100 * medians[name]:5.1f} %")
    return medians


def scale(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Many workers in virtual time."""
    from quire.config import split_flags

    table = LatencyTable.constant(
        20_000.0, num_blocks=2048, max_model_len=2048, vocab_size=32000
    )  # fmt: skip
    config = resolve(split_flags(["--max-num-seqs", "32", *words])[0], {}).config
    spec = f"poisson:rate={args.scale},requests={2 * args.scale},prompt=256,output=64"
    calls = generate(spec, vocabulary(table), 0)
    outcome = simulate(calls, table, config, workers=args.scale)
    report = outcome.report
    figures = {
        "workers": args.scale,
        "requests": report["completed"],
        "steps": report["steps"],
        "virtual_s": report["virtual_s"],
        "wall_s": round(outcome.wall_s, 2),
        "steps_per_s": round(outcome.steps_per_s),
        "events_per_s": round(outcome.num_events / outcome.wall_s),
    }
    print("  ".join(f"{k} {v}" for k, v in figures.items()))
    assert report["completed"] == len(calls) and not report["violations"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Flags after -- go to the server and the simulated scheduler."
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--vocab", type=int, default=500, help="prompt ids are below this")
    parser.add_argument("--context", type=int, default=512, help="longest prompt and answer")
    parser.add_argument(
        "--calibration", default="poisson:rate=6,requests=200,prompt=96,output=48",
        help="trace that the table is made from",
    )  # fmt: skip
    parser.add_argument(
        "--trace", default="poisson:rate=5,requests=150,prompt=96,output=48",
        help="trace that is compared",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", type=Path, help="keep the table here")
    parser.add_argument("--scale", type=int, default=0, help="only simulate so many workers")
    parser.add_argument("--json", type=Path, help="write the result here")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    flags = words[split + 1 :]
    found = scale(args, flags) if args.scale else compare(args, flags)
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "command": " ".join(words),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            **found,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
