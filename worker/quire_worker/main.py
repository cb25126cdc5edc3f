"""The worker as a process: signals, logging, progress while loading, exit status.

Knows nothing of what a worker computes. Imports torch only after the thread settings stand.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time

from quire import liveness
from quire import log as quire_log
from quire.config import EngineConfig
from quire.errors import QuireError

log = logging.getLogger("quire.worker")

SWITCH_INTERVAL_S = 0.0002  # a busy Python thread must not hold up the others for the default 5 ms
LINE_EVERY_S = 0.5  # between two lines of progress
LAST_STEP_S = 1.5  # what a step in hand gets after SIGTERM


def run(config: EngineConfig, rank: int = 0) -> int:
    """Load, serve until SIGTERM or the scheduler's goodbye; the exit status."""
    quire_log.setup("worker", config.log_level, config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stop = threading.Event()
    loading = threading.Event()
    loading.set()
    _stop_on_signals(stop, loading)
    try:
        return _run(config, rank, stop, loading)
    except QuireError as error:
        if config.log_level == "debug":
            log.exception("start-up failed")
        sys.stderr.write(f"{error}\n")
        return error.kind.exit_status
    except Exception:
        log.exception("the worker's loop failed")
        return 1


def _run(config: EngineConfig, rank: int, stop: threading.Event, loading: threading.Event) -> int:
    from quire_worker import backends

    backends.prepare_threads(config.num_threads)
    from quire_worker import daemon, faults
    from quire_worker.worker import Worker
    from quire_worker.zmq_link import ZmqLink

    pulse, fault = liveness.pulse(), faults.from_environ(os.environ)
    progress = Progress(f"loading {config.model_names[0]}")
    worker = Worker(config, rank, progress)
    progress.end()
    worker.runner.fault = fault
    server = None
    if config.worker_metrics_port:
        server = worker.metrics.serve(config.host, config.worker_metrics_port + rank)
    gc.collect()
    gc.freeze()
    loading.clear()
    try:
        if not stop.is_set():
            daemon.serve(worker, ZmqLink(config.step_address, pulse), stop, on_hung=_hung)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
        worker.close()
    return 0


def _hung(why: str) -> None:
    """Nothing in this process can end a step that hangs: only another process helps."""
    log.critical("%s; this process ends", why)
    os._exit(1)


def _stop_on_signals(stop: threading.Event, loading: threading.Event) -> None:
    """SIGTERM and SIGINT end the loop after the step in hand; while loading, at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def handle(number: int, frame: object) -> None:
        if loading.is_set():
            raise SystemExit(0)
        stop.set()
        last = threading.Timer(LAST_STEP_S, os._exit, (0,))
        last.daemon = True
        last.start()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


class Progress:
    """Called with (done, total): a bar on a terminal, else a line every 10 % or so."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._tty = sys.stderr.isatty()
        self._shown = -1
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if self._tty and percent != self._shown:
            bar = "#" * (percent * 30 // 100)
            sys.stderr.write(f"\r{self.label} [{bar:<30}] {percent:3d} %")
            sys.stderr.flush()
            self._shown = percent
        elif not self._tty and percent // 10 > max(self._shown, 0) // 10:
            if time.monotonic() - self._told > LINE_EVERY_S:
                log.info("%s: %d %%", self.label, percent)
                self._told = time.monotonic()
            self._shown = percent

    def end(self) -> None:
        """Leave the bar's line."""
        if self._tty and self._shown >= 0:
            sys.stderr.write("\n")
