"""`quire simulate`: what a configuration would do with a trace, without a model or a GPU.

Reads the words of the command line; the simulation itself is quire.simulation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire import latency_table
from quire.cli.options import Line
from quire.config import EngineConfig, Resolved
from quire.errors import ConfigError
from quire.latency_table import LatencyTable

if TYPE_CHECKING:
    from quire.simulation.trace import Arrival

MAX_WORKERS = 4096
MAX_TIME_S = 1e9
MAX_SEED = (1 << 31) - 1
ROUTES = ("load", "prefix")


def run(line: Line, resolved: Resolved) -> int:
    """Print the report; the exit status. Raises ConfigError."""
    _need_numpy()
    workers = line.integer("workers", 1, MAX_WORKERS)
    seed = line.integer("seed", 0, MAX_SEED)
    max_time = line.number("max_time", 0, MAX_TIME_S)
    route = line.option("route")
    if route not in ROUTES:
        raise ConfigError(f"--route {route!r} is not one of {', '.join(ROUTES)}.")
    table = _table(line, resolved.config)
    if line.option("calibrate"):
        return _write(line.option("calibrate"), "--calibrate", [table.to_json()])
    arrivals = _arrivals(line, table.sized(resolved.config), seed)
    if line.option("write_trace"):
        from quire.simulation.trace import to_line

        lines = (to_line(arrival) + "\n" for arrival in arrivals)
        return _write(line.option("write_trace"), "--write-trace", list(lines))
    from quire.simulation import ledger
    from quire.simulation.run import simulate

    outcome = simulate(
        arrivals, table, resolved.config, workers=workers, route=route, seed=seed,
        max_time=max_time or float("inf"),
    )  # fmt: skip
    speed = {
        "wall_s": round(outcome.wall_s, 3),
        "events_per_s": round(outcome.num_events / max(outcome.wall_s, 1e-9), 1),
        "steps_per_s": round(outcome.steps_per_s, 1),
    }
    if line.option("json"):
        print(json.dumps({**outcome.report, "simulator": speed}, indent=1))
        return 0
    print(ledger.text(outcome.report))
    print(
        f"simulator       {speed['wall_s']:.1f} s, {speed['steps_per_s']:.0f} steps/s (a plan and "
        f"its result), {speed['events_per_s']:.0f} events/s"
    )
    return 0


def _table(line: Line, config: EngineConfig) -> LatencyTable:
    """--table: a file, or a journal to make one of; without it the trace's journal; for
    --calibrate alone, a worker that is loaded and asked."""
    given = line.option("table")
    trace = line.option("trace")
    if not given and trace and is_journal(trace):
        given = trace
    if not given and line.option("calibrate"):
        return _ask_worker(config)
    if not given:
        raise ConfigError(
            "simulate needs --table FILE: a latency table or a journal. Make one with "
            "quire simulate --calibrate OUT [--table JOURNAL]."
        )
    if is_journal(given):
        from quire.simulation.recorded import from_journal

        return from_journal(given)
    return latency_table.read(given)


def _ask_worker(config: EngineConfig) -> LatencyTable:
    """What a real worker of these settings measures at start."""
    from quire.cli.services import load
    from quire.simulation.recorded import from_hello

    load("worker", "backends").prepare_threads(config.num_threads)
    worker: Any = load("worker", "worker").Worker(config)
    try:
        return from_hello(worker.hello()).check()
    finally:
        worker.close()


def _recorded(path: str) -> Sequence[Arrival]:
    """The requests of a journal, by arrival."""
    from quire.cli.trace import arrivals
    from quire.simulation.trace import arrival
    from quire_scheduler.segment import Segment, segments

    try:
        found, _ = arrivals(map(Segment, segments(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--trace {path}: {error}.") from None
    if not found:
        raise ConfigError(f"--trace {path} holds no request that yielded something.")
    return [arrival(tree, f"{path}: request {n}", f"line-{n}") for n, tree in enumerate(found, 1)]


def _arrivals(line: Line, table: LatencyTable, seed: int) -> Sequence[Arrival]:
    trace, spec = line.option("trace"), line.option("generate")
    if bool(trace) == bool(spec):
        raise ConfigError("simulate needs --trace FILE or --generate SPEC, one of them.")
    if trace:
        from quire.simulation.trace import read

        return _recorded(trace) if is_journal(trace) else read(trace)
    import numpy as np

    from quire.simulation.generate import Vocabulary, generate
    from quire_worker.simulated.tokens import oracle

    def answer(prompt: Any, number: int, count: int) -> Any:
        tokens, _ = oracle(
            prompt.tolist(), seed=number, max_tokens=count, max_model_len=table.max_model_len,
            vocab_size=table.vocab_size, eos_every=table.eos_every, eos=table.eos_token_id,
            ignore_eos=True,
        )  # fmt: skip
        return np.array(tokens, np.int32)

    return generate(spec, Vocabulary(table.vocab_size, table.max_model_len, answer), seed)


def is_journal(path: str) -> bool:
    """Whether it is a journal's folder or file, by its first bytes."""
    where = Path(path)
    if where.is_dir():
        return True
    try:
        with where.open("rb") as file:
            return file.read(6) == b"QUIREJ"
    except OSError:
        return False


def _write(path: str, name: str, parts: list[str]) -> int:
    try:
        Path(path).write_text("".join(parts), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} {path}: {error.strerror}.") from None
    print(f"wrote {path}")
    return 0


def _need_numpy() -> None:
    try:
        import numpy  # noqa: F401
        import zmq  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"simulate needs the package {error.name!r}, which is not installed: "
            "pip install 'quire[scheduler]'."
        ) from None
