"""The scheduler process: one engine thread, one event loop, one lock per address.

Knows how the parts are put together and how the process ends; nothing of what they do.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import hashlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO

from quire import liveness
from quire import log as quire_log
from quire.config import EngineConfig
from quire.errors import AddressInUse, StartupError
from quire.telemetry import Tracer
from quire_scheduler.engine import Engine
from quire_scheduler.metrics import MetricsPage
from quire_scheduler.server import Server
from quire_scheduler.throughput import Throughput
from quire_scheduler.zmq_link import ZmqLink

log = logging.getLogger("quire.scheduler")

POLL_S = 0.1
LONG_TURN_S = 10.0  # an engine that does not finish a turn in this time stands still
GRACE_S = 0.2  # for calls that are still open after the drain


def run(config: EngineConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Start-up errors go to stderr as
    one line."""
    quire_log.setup("scheduler", config.log_level, config.log_format)
    try:
        locks = [lock(config.step_address), lock(config.engine_address)]
        try:
            return asyncio.run(_serve(config))
        finally:
            for file in locks:
                if file is not None:
                    file.close()
    except StartupError as error:
        if config.log_level == "debug":
            log.exception("start-up failed")
        sys.stderr.write(f"{error}\n")
        return error.kind.exit_status


def lock(address: str) -> IO[str] | None:
    """Hold the address for this process until the file is closed (or the process dies). Raises
    AddressInUse when another scheduler holds it. Port 0 is nobody's."""
    if address.endswith(":0"):
        return None
    name = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    path = Path(tempfile.gettempdir()) / f"quire-scheduler-{os.getuid()}-{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(descriptor, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = file.read(16).strip()
        file.close()
        raise AddressInUse(
            f"another scheduler{f' (process {holder})' if holder else ''} serves {address}. "
            "Stop it or choose another address."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


async def _serve(config: EngineConfig) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    link = ZmqLink(config.step_address)
    tracer = Tracer("scheduler", config.otlp_traces_endpoint)
    engine = Engine(config, link, tracer=tracer)

    def crashed() -> None:
        loop.call_soon_threadsafe(stop.set)

    engine.on_crash = crashed
    throughput = Throughput(engine)
    page = MetricsPage(engine, throughput)
    server = Server(engine, config, page)
    pulse = asyncio.create_task(_beat(engine, liveness.pulse()), name="pulse")
    try:
        port = await server.start(config.engine_address)
        host = config.engine_address.rpartition(":")[0]
        if config.scheduler_metrics_port:
            page.serve(host.strip("[]") or "127.0.0.1", config.scheduler_metrics_port)
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, stop.set)
        engine.start()
        log.info("listening on %s:%d (gRPC) and %s (workers)", host, port, link.endpoint)
        tasks = [
            asyncio.create_task(_freeze_when_ready(engine), name="freeze"),
            asyncio.create_task(throughput.run(), name="throughput"),
        ]
        await stop.wait()
        for task in tasks:
            task.cancel()
        if engine.crashed is None:
            await _drain(engine, config.drain_timeout, stop)
        await server.stop(GRACE_S)
    finally:
        await asyncio.to_thread(engine.stop)
        pulse.cancel()
        page.close()
        tracer.shutdown()
    return 0 if engine.crashed is None else 1


async def _drain(engine: Engine, timeout: float, stop: asyncio.Event) -> None:
    """Let running requests end; a second signal ends the wait."""
    log.info("draining for at most %g s", timeout)
    stop.clear()
    drained = asyncio.create_task(asyncio.to_thread(engine.drain, timeout), name="drain")
    again = asyncio.create_task(stop.wait(), name="second-signal")
    await asyncio.wait((drained, again), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if drained.done():
        log.info("drained, %d requests unfinished", drained.result())


async def _beat(engine: Engine, pulse: liveness.Pulse) -> None:
    """Show that this loop turns, and the engine's with it."""
    while True:
        if engine.still_s < LONG_TURN_S:
            pulse.beat()
        await asyncio.sleep(liveness.INTERVAL_S)


async def _freeze_when_ready(engine: Engine) -> None:
    """What is alive after warm-up stays alive: the collector need not look at it again."""
    while True:
        await asyncio.sleep(POLL_S)
        if engine.stats().ready:
            break
    gc.collect()
    gc.freeze()
