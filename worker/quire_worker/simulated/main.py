"""Simulated workers as a process: one, or all ranks of a group, in real time.

Loads no model and no torch; everything else is as in the real worker's process.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading

from quire import latency_table
from quire import log as quire_log
from quire.config import EngineConfig
from quire.errors import QuireError
from quire_worker import daemon
from quire_worker.simulated.worker import SimulatedWorker
from quire_worker.zmq_link import ZmqLink

log = logging.getLogger("quire.worker")

SWITCH_INTERVAL_S = 0.0002


def run(config: EngineConfig, table: str, rank: int = 0, count: int = 1) -> int:
    """Serve until SIGTERM or the scheduler's goodbye; the exit status. The ranks here are `rank`
    and the count - 1 after it, the last ones of their group."""
    quire_log.setup("worker", config.log_level, config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        sizes = latency_table.read(table).sized(config)
        ranks = range(rank, rank + count)
        workers = [SimulatedWorker(sizes, rank=r, tp_size=ranks.stop, seed=r) for r in ranks]
        log.info("simulating %d worker(s) of %s from %s", count, sizes.model, table)
        return _serve(workers, config.step_address, stop)
    except QuireError as error:
        sys.stderr.write(f"{error}\n")
        return error.kind.exit_status


def _serve(workers: list[SimulatedWorker], address: str, stop: threading.Event) -> int:
    """Each worker in a thread of its own; when one ends, all do. Raises what ended it."""
    errors: list[BaseException] = []

    def serve(worker: SimulatedWorker) -> None:
        try:
            daemon.serve(worker, ZmqLink(address), stop)
        except BaseException as error:
            errors.append(error)
        finally:
            stop.set()

    threads = [
        threading.Thread(target=serve, args=(w,), name=f"simulated-{w.rank}") for w in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return 0
