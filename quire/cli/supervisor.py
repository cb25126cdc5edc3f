"""Start the services as child processes, keep them running, and end them in order.

Knows how to start, watch and stop processes; what the services do is theirs. A child that ends is
started again, one whose pulse stops is killed first. Children die with this process, however it
dies.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from quire import liveness
from quire.cli import child
from quire.config import ENV_ALIASES, NOT_SETTINGS, EngineConfig, to_environ

BACKOFF_S = (0.1, 5.0)  # first and longest wait before a restart
STEADY_S = 1.0  # a child that served this long starts at the first wait again
GRACE_S = 5.0  # from SIGTERM to SIGKILL, beside the time for draining
WATCH_S = 0.05
# Without a beat for so long a child stands still. Beats are INTERVAL_S apart, so that a standstill
# is noticed within 3 s whenever it begins.
STILL_S = 2.8
# Killing a gateway ends its clients' streams, which killing another service does not.
GATEWAY_STILL_S = 30.0
STALL_S = 0.5  # the watch came so much too late: it stood still itself, nobody is blamed


@dataclass(eq=False)
class Service:
    """One supervised service. Mutable state: all but the first four, changed on the loop only."""

    name: str
    command: list[str]
    grace_s: float = GRACE_S
    still_s: float = STILL_S
    backoff_s: float = BACKOFF_S[0]
    process: asyncio.subprocess.Process | None = None
    served: float | None = None  # monotonic time of the first beat: it loads no more
    heard: float = 0.0  # of the last one
    ending: asyncio.Event = field(default_factory=asyncio.Event)  # not to be started again

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None


def services(config: EngineConfig, table: str = "") -> list[Service]:
    """What serves `config`, in the order in which it is stopped; with the path of a latency table
    its workers are simulated."""
    run = [sys.executable, "-P", "-m", "quire.cli"]
    ranks = range(config.tensor_parallel_size)
    simulate = ["--simulate", table] if table else []
    return [
        Service(
            "gateway",
            [*run, "gateway"],
            grace_s=config.drain_timeout + GRACE_S,
            still_s=GATEWAY_STILL_S,
        ),
        Service("scheduler", [*run, "scheduler"]),
        *(
            Service(_rank_name(r, len(ranks)), [*run, "worker", "--rank", str(r), *simulate])
            for r in ranks
        ),
    ]


def _rank_name(rank: int, count: int) -> str:
    return "worker" if count == 1 else f"worker {rank}"


def environment(config: EngineConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a child inherits: all but settings, which it gets resolved.

    By the environment and not by flags, so that no key shows in a list of processes.
    """
    kept = {
        key: value
        for key, value in inherited.items()
        if key not in ENV_ALIASES
        and key != "QUIRE_CONFIG"
        and (not key.startswith("QUIRE_") or key in NOT_SETTINGS)
    }
    return {**kept, **to_environ(config), child.VARIABLE: str(os.getpid())}


class Supervisor:
    """Runs a list of services until told to stop. One use each; `run` is its whole life."""

    def __init__(
        self,
        services: list[Service],
        environ: Mapping[str, str],
        ready: Callable[[], Coroutine[Any, Any, None]],
        say: Callable[..., None],
    ) -> None:
        """`ready` is a coroutine function that returns when the services can be used."""
        self._services = services
        self._environ = dict(environ)
        self._ready = ready
        self._say = say
        # Mutable state, all of it touched by the event loop's thread only.
        self._is_ready = False
        self._stop = asyncio.Event()
        self._signals = 0
        self._failed: asyncio.Future[tuple[Service, int]] | None = None

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Start all, call `on_ready` once they can be used, watch until a signal; the status."""
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(signal.SIGHUP, self._on_signal)
        keepers = [
            asyncio.create_task(self._keep(s), name=f"keep {s.name}") for s in self._services
        ]
        ready = asyncio.create_task(self._ready(), name="ready")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        watch = asyncio.create_task(self._watch(), name="watch")
        try:
            waiting: set[asyncio.Future[Any]] = {ready, stop, self._failed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                return self._report(*self._failed.result())
            if ready.done():
                ready.result()
                self._is_ready = True
                on_ready()
                await stop
            return 0
        finally:
            self._stop.set()
            ready.cancel()
            await self._end_all()
            for task in (*keepers, stop, watch):
                task.cancel()
            await asyncio.gather(*keepers, ready, stop, watch, return_exceptions=True)
            self._kill_all()

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._kill_all()

    # -- one service ------------------------------------------------------------------------
    async def _keep(self, service: Service) -> None:
        """Start one service, and again whenever it ends, until its own end has come: while the
        gateway drains, its streams need the others."""
        while not service.ending.is_set():
            status = await self._run(service)
            if service.ending.is_set():
                return
            if not self._is_ready:
                if self._failed is not None and not self._failed.done():
                    self._failed.set_result((service, status))
                return
            await self._pause(service, status)

    async def _run(self, service: Service) -> int:
        """One process from start to end, its pulse listened to; the status."""
        loop = asyncio.get_running_loop()
        mine, its = os.pipe()
        os.set_blocking(mine, False)
        service.served = None
        loop.add_reader(mine, self._hear, service, mine)
        try:
            try:
                service.process = await asyncio.create_subprocess_exec(
                    *service.command,
                    env={**self._environ, liveness.VARIABLE: str(its)},
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(its,),
                    # Ctrl-C goes to the terminal's whole group; the order of ending is ours.
                    process_group=0,
                )
            finally:
                os.close(its)
            if service.ending.is_set():
                service.process.kill()
            return await service.process.wait()
        finally:
            loop.remove_reader(mine)
            os.close(mine)

    def _hear(self, service: Service, pipe: int) -> None:
        if not os.read(pipe, 4096):  # all ends are closed
            asyncio.get_running_loop().remove_reader(pipe)
            return
        service.heard = time.monotonic()
        if service.served is None:
            service.served = service.heard

    async def _pause(self, service: Service, status: int) -> None:
        """Wait before a restart: longer each time, unless the service had served a while."""
        if service.served is not None and time.monotonic() - service.served > STEADY_S:
            service.backoff_s = BACKOFF_S[0]
        self._say(
            f"{service.name} {ended(status)}; starting it again in {service.backoff_s:g} s.",
            child=service.name,
            status=status,
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(service.ending.wait(), service.backoff_s)
        service.backoff_s = min(service.backoff_s * 2, BACKOFF_S[1])

    async def _watch(self) -> None:
        """Kill what stands still. A child that has not beaten yet is loading, for as long as it
        takes; one that is told to end has its grace."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            late, before = now - before - WATCH_S, now
            for service in self._services:
                if late > STALL_S:
                    service.heard += late
                if not service.running or service.served is None or service.ending.is_set():
                    continue
                if now - service.heard > service.still_s:
                    self._say(
                        f"{service.name} has stood still for {now - service.heard:.1f} s; killed.",
                        child=service.name,
                    )
                    service.heard = math.inf  # said once
                    self._signal(service, signal.SIGKILL)

    def _report(self, service: Service, status: int) -> int:
        """Tell why the start failed, where the child could not; the exit status."""
        if status > 0:  # it has said why itself
            return status
        hint = " The system may have run out of memory." if status == -signal.SIGKILL else ""
        print(
            f"Error: {service.name} {ended(status)} while it started.{hint}",
            file=sys.stderr,
            flush=True,
        )
        return 1

    # -- the end ----------------------------------------------------------------------------
    async def _end_all(self) -> None:
        """SIGTERM one after the other, each with its time; SIGKILL what is left.

        A start that failed has nothing to drain: then all are ended at once.
        """
        if not self._is_ready:
            for service in self._services:
                self._end(service)
            grace = time.monotonic() + 2.0
            for service in self._services:
                await self._gone(service, max(grace - time.monotonic(), 0.0))
            return
        for service in self._services:
            self._end(service)
            await self._gone(service, service.grace_s)

    def _end(self, service: Service) -> None:
        service.ending.set()
        self._signal(service, signal.SIGTERM)

    async def _gone(self, service: Service, timeout_s: float) -> None:
        if service.process is None or service.process.returncode is not None:
            return
        try:
            await asyncio.wait_for(service.process.wait(), timeout_s)
        except TimeoutError:
            if self._is_ready:
                self._say(f"{service.name} did not end in {timeout_s:.0f} s; killed.")
            self._signal(service, signal.SIGKILL)
            await service.process.wait()

    def _kill_all(self) -> None:
        for service in self._services:
            service.ending.set()
            self._signal(service, signal.SIGKILL)

    @staticmethod
    def _signal(service: Service, number: signal.Signals) -> None:
        if service.process is not None and service.process.returncode is None:
            with suppress(ProcessLookupError):
                service.process.send_signal(number)


def ended(status: int) -> str:
    """'ended with status 1' or 'was killed by SIGKILL'."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
