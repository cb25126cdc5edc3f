"""`quire journal show` and `quire journal trace`: a journal for people, and for the simulator.

Needs no weights and imports no tensor library.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator

from quire.cli import timeline, trace
from quire.cli.options import Line
from quire.cli.replay import open_segments
from quire.config import Resolved
from quire.errors import ConfigError

MAX_EPOCH = 1 << 63
MAX_SECONDS = 1e9


def run(line: Line, resolved: Resolved) -> int:
    """Print what is asked for; 1 when the journal is damaged."""
    from quire_scheduler.segment import DamagedSegment

    actions: dict[str, Callable[[Line], Iterable[str]]] = {"show": show, "trace": make_trace}
    action = line.option("action")
    if action not in actions:
        raise ConfigError(f"quire journal {action or 'WHAT'}: expected show or trace, then PATH.")
    try:
        for row in actions[action](line):
            print(row)
    except DamagedSegment as damage:
        sys.stdout.flush()
        print(f"{damage}.", file=sys.stderr)
        return 1
    sys.stdout.flush()  # here, where a reader that went away is no error
    return 0


def show(line: Line) -> Iterator[str]:
    """One line per record that the options let through."""
    request = line.option("request")
    epoch = line.integer("epoch", 0, MAX_EPOCH) if line.option("epoch") else None
    begin = line.number("from", 0, MAX_SECONDS) if line.option("from") else 0.0
    end = line.number("to", 0, MAX_SECONDS) if line.option("to") else math.inf
    render = json.dumps if line.option("json") else timeline.text
    for event in timeline.events(open_segments(line.option("path"))):
        if request and not concerns(event, request):
            continue
        if epoch is not None and event.get("epoch") != epoch:
            continue
        if begin <= event.get("t", begin) <= end:
            yield render(event)


def concerns(event: timeline.Event, request: str) -> bool:
    """Whether the event is about this request."""
    if request in event.get("requests", ()):
        return True
    rows = (*event.get("admits", ()), *event.get("retired", ()), *event.get("errors", ()))
    return any(row["request"] == request for row in rows)


def make_trace(line: Line) -> Iterator[str]:
    """One JSON object per request; what is left out is told on stderr."""
    lines, left_out = trace.arrivals(open_segments(line.option("path")))
    if left_out:
        print(f"{left_out} requests yielded nothing and are left out", file=sys.stderr)
    return map(json.dumps, lines)
