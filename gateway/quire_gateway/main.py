"""The gateway process: binds its port, loads the tokenizer, serves, drains.

Knows signals and exit statuses; app.py knows the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvloop
from aiohttp import web

from quire import hub, liveness
from quire import log as logs
from quire.config import EngineConfig
from quire.errors import QuireError, StartupError
from quire_gateway import text
from quire_gateway.app import RUNNER_OPTIONS, build
from quire_gateway.ports import listen
from quire_gateway.state import Gateway
from quire_gateway.text import TextModel

log = logging.getLogger(__name__)

CUT_SECONDS = 1.0  # for the last error events after the drain time is up


def run(config: EngineConfig) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. Answers /health while it still loads.

    The first signal drains: not ready at once, running requests finish within
    `drain_timeout`. A second one ends it now.
    """
    logs.setup("gateway", config.log_level, config.log_format)
    try:
        sock = listen(config.host, config.port)
        return uvloop.run(_serve(config, sock))
    except StartupError as error:
        log.debug("can't start", exc_info=True)
        sys.stderr.write(f"{error}\n")
        return error.kind.exit_status
    except KeyboardInterrupt:
        return 130


def load_text(config: EngineConfig) -> TextModel:
    """What the model's folder says about text. Raises ModelError."""
    folder = hub.resolve(config.model, config.revision or None)
    words = hub.resolve_tokenizer(config.tokenizer, folder)
    return text.load(folder, words, config.chat_template, config.generation_config)


async def _serve(config: EngineConfig, sock: socket.socket) -> int:
    gateway = Gateway(config)
    stop = _signals()
    pulse = asyncio.create_task(_beat(liveness.pulse()), name="pulse")
    runner = web.AppRunner(build(gateway), **RUNNER_OPTIONS)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        host, port = sock.getsockname()[:2]
        log.info("listening", extra={"address": f"http://{host}:{port}"})
        if not config.api_key and not host.startswith(("127.", "::1")):
            log.warning("reachable from other machines without a key; set --api-key")
        loading = _in_daemon_thread(lambda: load_text(config))
        stopping = asyncio.create_task(stop.get(), name="first-signal")
        first: set[asyncio.Future[Any]] = {loading, stopping}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            gateway.text = loading.result()
            await stopping
        await _drain(gateway, config.drain_timeout, stop)
    finally:
        await runner.cleanup()
        pulse.cancel()
    return 0


async def _beat(pulse: liveness.Pulse) -> None:
    """Show that the event loop turns."""
    while True:
        pulse.beat()
        await asyncio.sleep(liveness.INTERVAL_S)


def _in_daemon_thread(work: Callable[[], TextModel]) -> asyncio.Future[TextModel]:
    """Run work beside the event loop, in a thread that never keeps the process from ending
    (it may be downloading)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[TextModel] = loop.create_future()

    def settle(result: TextModel | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if result is not None:
            future.set_result(result)
        else:
            future.set_exception(error or RuntimeError("no result"))

    def body() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, name="load-text", daemon=True).start()
    return future


async def _drain(gateway: Gateway, timeout: float, stop: asyncio.Queue[int]) -> None:
    log.info("draining", extra={"open": gateway.active, "drain_timeout": timeout})
    draining = asyncio.create_task(gateway.drain(timeout), name="drain")
    again = asyncio.create_task(stop.get(), name="second-signal")
    done, _ = await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if again in done or not draining.result():
        draining.cancel()
        log.warning("cutting requests that still run", extra={"open": gateway.active})
        gateway.engine.fail_all(QuireError("draining", "The server is shutting down."))
        await gateway.drain(CUT_SECONDS)


def _signals() -> asyncio.Queue[int]:
    """A queue that gets each SIGTERM and SIGINT."""
    received: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received.put_nowait, number)
    return received
