"""A supervisor of fake services, and the fake service: run as scripts by test_supervisor.

`supervised.py supervise EVENTS NAME=OPTION,OPTION ...` runs quire's supervisor over fakes;
`supervised.py fake EVENTS NAME OPTION ...` is one of them. Each event is a line in EVENTS.
Options: exit=STATUS (at once), drain=SECONDS (from SIGTERM to the end), deaf (SIGTERM is
ignored), once=STATUS (the first start ends so after `ready` is told), silent (never ready), beats
(it shows its pulse), hang (the first start's pulse stops after `ready`, it lives on).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from quire import liveness
from quire.cli import child, supervisor


def note(events: str, text: str) -> None:
    with open(events, "a") as file:
        file.write(text + "\n")


def fake(events: str, name: str, *options: str) -> int:
    child.end_with_parent()
    pulse = liveness.pulse()
    given = dict((*o.split("="), "")[:2] for o in options if o)
    if "exit" in given:
        print(f"Model error: {name} can't", file=sys.stderr)
        return int(given["exit"])
    done = [False]

    def on_term(number: int, frame: object) -> None:
        note(events, f"{name} term")
        done[0] = "deaf" not in given

    signal.signal(signal.SIGTERM, on_term)
    note(events, f"{name} start {os.getpid()}")
    before = Path(events).read_text().count(f"{name} start")
    while not done[0]:
        if "once" in given and before == 1 and "ready" in Path(events).read_text():
            return int(given["once"])
        hangs = "hang" in given and before == 1 and "ready" in Path(events).read_text()
        if "beats" in given and not hangs:
            pulse.beat()
        time.sleep(0.01)
    time.sleep(float(given.get("drain", 0)))
    note(events, f"{name} end")
    return 0


def supervise(events: str, *specs: str) -> int:
    services = []
    for spec in specs:
        name, _, options = spec.partition("=")
        command = [sys.executable, "-P", __file__, "fake", events, name, *options.split(",")]
        services.append(supervisor.Service(name, command, grace_s=1.0, still_s=1.5))

    def all_started() -> bool:
        text = Path(events).read_text() if Path(events).exists() else ""
        return all(f"{s.name} start" in text for s in services) and "silent" not in specs[0]

    async def ready() -> None:
        while not all_started():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def say(message: str, **fields: object) -> None:
        print(message, flush=True)

    environ = {**os.environ, child.VARIABLE: str(os.getpid())}
    watcher = supervisor.Supervisor(services, environ, ready, say)

    def on_ready() -> None:
        note(events, "ready")
        say("ready")

    return asyncio.run(watcher.run(on_ready))


if __name__ == "__main__":
    sys.exit({"fake": fake, "supervise": supervise}[sys.argv[1]](*sys.argv[2:]))
