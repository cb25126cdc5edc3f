"""`quire gateway`, `quire scheduler`, `quire worker`: one service in this process.

Imports the one service that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from quire.cli.options import Line
from quire.config import Resolved
from quire.errors import ConfigError

MAX_RANK = 1023
MAX_COUNT = 256


def gateway(line: Line, resolved: Resolved) -> int:
    """Serve HTTP until a signal; the exit status."""
    return int(_service("gateway")(resolved.config))


def scheduler(line: Line, resolved: Resolved) -> int:
    """Schedule until a signal; the exit status."""
    return int(_service("scheduler")(resolved.config))


def worker(line: Line, resolved: Resolved) -> int:
    """Compute, or simulate it, until a signal; the exit status."""
    rank = line.integer("rank", 0, MAX_RANK)
    table = line.option("simulate")
    count = line.integer("count", 1, MAX_COUNT)
    if table:
        run = _service("worker", "simulated.main")
        return int(run(resolved.config, table, rank, count))
    if count != 1:
        raise ConfigError("--count goes with --simulate: a real worker is one process a device.")
    return int(_service("worker")(resolved.config, rank))


def _service(name: str, module: str = "main") -> Callable[..., Any]:
    """The service's run(). Raises ConfigError when what it needs is not installed."""
    return load(name, module).run  # type: ignore[no-any-return]


def load(name: str, module: str) -> Any:
    """A module of a service. Raises ConfigError when what it needs is not installed."""
    try:
        return import_module(f"quire_{name}.{module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("quire"):
            raise
        raise ConfigError(
            f"the {name} needs the package {error.name!r}, which is not installed: "
            f"pip install 'quire[{name}]'."
        ) from None
