"""The worker's metrics: Prometheus names, and the page that shows them.

Knows what a step's numbers mean and nothing of how they came about. Each worker has its own
registry, so that several can live in one process.
"""

from __future__ import annotations

import os
import time
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.exposition import generate_latest

from quire.errors import AddressInUse
from quire_worker.results import StepStats

disable_created_metrics()  # a gauge of birth times beside every counter helps nobody

_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2,
    0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PHASES = ("queue", "prepare", "forward", "sample", "idle", "copy")


class Metrics:
    """Counts steps. `observe` is called once a step by the runner's thread, `page` by others."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        part = Histogram(
            "quire_worker_step_part_seconds",
            "Time of a step by part: queue (plan received to begin), prepare, forward, sample, "
            "idle (the device before the step), and copy (KV blocks between tiers).",
            ["part"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._parts = [part.labels(name) for name in PHASES]
        self._steps = Counter(
            "quire_worker_steps", "Plans answered, by status.", ["status"], registry=registry
        )
        self._statuses: dict[str, Any] = {}
        tokens = Counter(
            "quire_worker_tokens", "Tokens computed, by kind.", ["kind"], registry=registry
        )
        self._prefill, self._decode = tokens.labels("prefill"), tokens.labels("decode")
        self._sampled = Counter("quire_worker_sampled_tokens", "Tokens sampled.", registry=registry)
        self._rows = Histogram(
            "quire_worker_step_rows", "Requests in a step.", buckets=_ROWS, registry=registry
        )
        self._dropped = Counter(
            "quire_worker_dropped_frames", "Frames that could not be read.", registry=registry
        )
        memory = Gauge(
            "quire_worker_device_memory_bytes",
            "Memory of the device: used by this worker, and in all.", ["kind"], registry=registry,
        )  # fmt: skip
        self._memory_used, self._memory_total = memory.labels("used"), memory.labels("total")
        self._utilization = Gauge(
            "quire_worker_device_utilization_ratio",
            "Share of the last second in which a step ran.", registry=registry,
        )  # fmt: skip
        self._kv_pool = Gauge(
            "quire_worker_kv_pool_bytes", "Size of the KV pool.", registry=registry
        )
        self._host_pool = Gauge(
            "quire_worker_host_kv_pool_bytes", "Size of the host tier's KV pool.", registry=registry
        )
        self._copied = Counter(
            "quire_worker_copied_blocks", "KV blocks copied between tiers.", registry=registry
        )
        self._weights = Gauge(
            "quire_worker_weight_bytes", "Size of the weights.", registry=registry
        )
        self._resident = Gauge(
            "quire_worker_resident_memory_bytes", "Resident memory of the process.",
            registry=registry,
        )  # fmt: skip
        self._last = (time.monotonic_ns(), 0)

    def observe(self, status: str, stats: StepStats) -> None:
        """Count one answered plan; status: ok, failed or refused."""
        counter = self._statuses.get(status)
        if counter is None:
            counter = self._statuses[status] = self._steps.labels(status)
        counter.inc()
        if status != "ok":
            return
        times = (stats.queue, stats.prepare, stats.forward, stats.sample, stats.idle, stats.copy)
        for child, nanoseconds in zip(self._parts, times, strict=True):
            child.observe(nanoseconds / 1e9)
        self._rows.observe(stats.num_rows)
        self._copied.inc(stats.num_copied)
        self._prefill.inc(stats.prefill_tokens)
        self._decode.inc(stats.decode_tokens)
        self._sampled.inc(stats.num_sampled)

    def frame_dropped(self) -> None:
        self._dropped.inc()

    def set_sizes(self, kv_pool: int, host_pool: int, weights: int, memory_total: int) -> None:
        """Bytes, once after loading."""
        self._kv_pool.set(kv_pool)
        self._host_pool.set(host_pool)
        self._weights.set(weights)
        self._memory_total.set(memory_total)

    def sample_usage(self, busy_ns: int, memory_used: int) -> None:
        """About once a second: busy_ns in all so far, bytes used on the device."""
        now = time.monotonic_ns()
        then, busy_then = self._last
        if now - then > 100_000_000:
            self._utilization.set(min((busy_ns - busy_then) / (now - then), 1.0))
            self._last = (now, busy_ns)
        self._memory_used.set(memory_used)
        self._resident.set(resident_bytes())

    def page(self) -> bytes:
        """The Prometheus text page."""
        return generate_latest(self.registry)

    def serve(self, host: str, port: int) -> Any:
        """Serve the page over HTTP; returns the server. Raises AddressInUse."""
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise AddressInUse(
                f"can't listen on {host}:{port} for worker metrics ({error.strerror}); "
                "choose another with --worker-metrics-port, 0 for none."
            ) from None
        return server


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system doesn't say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
