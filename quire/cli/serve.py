"""`quire serve`: check, tell, start the three services, and stay.

Knows the order of things; checks are in plan, processes in supervisor.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from urllib.parse import urlsplit

from quire import latency_table
from quire.cli import machine, plan, readiness, supervisor
from quire.cli.options import Line
from quire.cli.say import Say
from quire.config import Resolved
from quire.version import __version__


def run(line: Line, resolved: Resolved) -> int:
    """Serve until a signal; the exit status. Raises StartupError before anything is started."""
    what = plan.make(resolved)
    table = line.option("simulate")
    if table:
        latency_table.read(table).sized(what.config)  # says now what is wrong with it
    if line.option("dry_run"):
        print(what.table())
        return 0
    config = what.config
    say = Say(config.log_format)
    name, size = config.model_names[0], what.checkpoint.loaded_bytes(config.dtype)
    say(
        f"Quire {__version__}: loading {name} ({what.checkpoint.architecture}, "
        f"{plan.readable(size)}) on {what.where}",
        model=name,
        folder=str(what.checkpoint.folder),
    )
    for note in what.notes:
        say(note)
    address = plan.url(config)

    def on_ready() -> None:
        key = " -H 'Authorization: Bearer <key>'" if config.api_key else ""
        body = {"model": name, "messages": [{"role": "user", "content": "Tell me a story."}]}
        say(
            f"Try: curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )
        took = machine.process_age()
        say(f"Ready in {took:.1f} s: {address}  (model {name}, {what.where})", url=address)

    return asyncio.run(_supervise(what, table, address, say, on_ready))


async def _supervise(
    what: plan.Plan, table: str, address: str, say: Say, on_ready: Callable[[], None]
) -> int:
    parts = urlsplit(address)
    host, port = parts.hostname or "127.0.0.1", parts.port or what.config.port
    watcher = supervisor.Supervisor(
        supervisor.services(what.config, table),
        supervisor.environment(what.config, os.environ),
        lambda: readiness.until_ready(host, port, say),
        say,
    )
    return await watcher.run(on_ready)
