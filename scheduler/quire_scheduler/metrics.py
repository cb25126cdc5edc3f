"""The scheduler's Prometheus page, made from the engine's counters when somebody looks.

Knows no request. The loop only counts; everything here runs at collect time.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from quire.errors import AddressInUse, ConfigError
from quire_scheduler.counters import Counters, Histogram
from quire_scheduler.engine import Engine, Stats
from quire_scheduler.throughput import Throughput

STATES = ("loading", "ready", "draining", "failed")


class EngineCollector(Collector):
    """Families of one engine."""

    def __init__(self, engine: Engine, throughput: Throughput) -> None:
        self._engine = engine
        self._throughput = throughput

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        counters, stats = self._engine.counters, self._engine.stats()
        yield from self._gauges(stats)
        yield from _running_totals(stats)
        yield from _counters(counters, stats)
        yield from _histograms(counters)

    def _gauges(self, stats: Stats) -> Iterator[Metric]:
        total = stats.num_blocks_total
        for name, text, value in (
            ("quire_requests_running", "Requests that have a slot", stats.num_running),
            ("quire_requests_waiting", "Requests that wait for a slot", stats.num_waiting),
            (
                "quire_requests_limit",
                "Requests that may run and wait in all; more are refused",
                stats.max_requests,
            ),
            ("quire_kv_blocks", "KV blocks in all", total),
            ("quire_kv_blocks_used", "KV blocks held by requests", stats.num_blocks_used),
            ("quire_kv_blocks_cached", "KV blocks kept for reuse", stats.num_blocks_cached),
            (
                "quire_kv_usage_ratio",
                "Share of KV blocks held by requests, 0 to 1",
                stats.num_blocks_used / total if total else 0.0,
            ),
            ("quire_engine_healthy", "1 = tokens come when they should", int(stats.healthy)),
            ("quire_engine_epoch", "Epoch of the step protocol", stats.epoch),
            (
                "quire_journal_failed",
                "1 = the journal is off because of an error",
                int(self._engine.counters.journal_failed),
            ),
            ("quire_scheduler_memory_bytes", "Resident memory", resident_bytes()),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield from _tier(stats)
        speed = GaugeMetricFamily(
            "quire_throughput_tokens_per_second", "Over the last ten seconds", labels=["kind"]
        )
        speed.add_metric(["prompt"], self._throughput.prompt)
        speed.add_metric(["output"], self._throughput.output)
        yield speed
        state = GaugeMetricFamily("quire_engine_state", "The state it is in is 1", labels=["state"])
        now = state_of(stats.ready, stats.draining, self._engine.crashed is not None)
        for name in STATES:
            state.add_metric([name], int(name == now))
        yield state


def _running_totals(stats: Stats) -> Iterator[Metric]:
    for name, text, value in (
        (
            "quire_prefix_cache_query_tokens",
            "Prompt tokens looked up in the prefix cache",
            stats.prefix_query_tokens,
        ),
        (
            "quire_prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache",
            stats.prefix_hit_tokens,
        ),
        (
            "quire_prefix_cache_evicted_blocks",
            "Cached blocks that made room for others",
            stats.evicted_blocks,
        ),
        (
            "quire_prefix_cache_grafted_blocks",
            "Blocks known by name only, from before a restart, that a prompt found",
            stats.grafted_blocks,
        ),
    ):
        yield CounterMetricFamily(name, text, value)


def _tier(stats: Stats) -> Iterator[Metric]:
    """The host tier, preemption, and what was computed twice."""
    for name, text, value in (
        ("quire_kv_host_blocks", "KV blocks of the host tier", stats.host_blocks_total),
        ("quire_kv_host_blocks_used", "KV blocks kept on the host", stats.host_blocks_used),
        (
            "quire_recomputed_tokens_ratio",
            "Share of the tokens in plans that had been computed before",
            stats.num_recomputed_tokens / max(stats.num_scheduled_tokens, 1),
        ),
    ):
        yield GaugeMetricFamily(name, text, value)
    size = stats.host_block_bytes
    for name, text, value in (
        ("quire_kv_offloaded_blocks", "KV blocks copied to the host", stats.offloaded_blocks),
        ("quire_kv_offloaded_bytes", "The same in bytes", stats.offloaded_blocks * size),
        ("quire_kv_loaded_blocks", "KV blocks copied back to the device", stats.loaded_blocks),
        ("quire_kv_loaded_bytes", "The same in bytes", stats.loaded_blocks * size),
        (
            "quire_prefix_cache_host_hit_tokens",
            "Prompt tokens found on the host",
            stats.host_hit_tokens,
        ),
        (
            "quire_recomputed_tokens",
            "Tokens computed again after preemption or recovery, counted when a request leaves",
            stats.num_recomputed_tokens,
        ),
    ):
        yield CounterMetricFamily(name, text, value)
    preemptions = CounterMetricFamily(
        "quire_preemptions",
        "Requests that lost their blocks; kind: how the least was to be lost",
        labels=["kind"],
    )
    for kind, count in stats.preemptions:
        preemptions.add_metric([kind], count)
    yield preemptions


def _counters(counters: Counters, stats: Stats) -> Iterator[Metric]:
    dropped = counters.frames_dropped.copy()
    dropped["malformed"] = dropped.get("malformed", 0) + stats.malformed_frames
    for name, text, value in (
        ("quire_scheduler_steps", "Steps that were run", counters.steps),
        ("quire_output_tokens", "Tokens sampled", counters.output_tokens),
        ("quire_scheduled_tokens", "Tokens in plans", counters.scheduled_tokens),
        ("quire_prefill_tokens", "Tokens of prompts computed", counters.prompt_tokens),
        ("quire_engine_epochs", "Epochs begun", counters.epochs),
        ("quire_worker_losses", "Workers lost", counters.worker_losses),
        ("quire_failed_steps", "Steps that failed on a worker", counters.failed_steps),
        ("quire_journal_bytes", "Bytes written to the journal", counters.journal_bytes),
        ("quire_journal_segments", "Segments of the journal begun", counters.journal_segments),
    ):
        yield CounterMetricFamily(name, text, value)
    for name, text, label, values in (
        ("quire_scheduler_requests", "Requests ended", "reason", counters.finished),
        ("quire_scheduler_rejects", "Submissions refused", "error", counters.rejected),
        ("quire_frames_dropped", "Frames not used", "reason", dropped),
    ):
        family = CounterMetricFamily(name, text, labels=[label])
        for key, value in sorted(values.copy().items()):
            family.add_metric([key], value)
        yield family


def _histograms(counters: Counters) -> Iterator[Metric]:
    step = HistogramMetricFamily(
        "quire_step_part_seconds", "Where the time of a step goes", labels=["part"]
    )
    for part, histogram in (
        ("plan", counters.plan_time),
        ("wire", counters.wire_time),
        ("queue", counters.worker_queue_time),
        ("prepare", counters.prepare_time),
        ("copy", counters.copy_time),
        ("forward", counters.forward_time),
        ("sample", counters.sample_time),
        ("idle", counters.idle_time),
    ):
        _add(step, [part], histogram)
    yield step
    for name, text, histogram in (
        ("quire_step_seconds", "Prepare, forward and sample of a step", counters.step_time),
        ("quire_queue_seconds", "From arrival to the first plan", counters.queue_time),
        ("quire_step_requests", "Requests in a step", counters.batch_size),
        ("quire_step_prefill_tokens", "Tokens of prompts in a step", counters.prefill_tokens),
        ("quire_step_decode_tokens", "Decoding requests in a step", counters.decode_tokens),
    ):
        family = HistogramMetricFamily(name, text)
        _add(family, [], histogram)
        yield family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets: list[tuple[str, float]] = []
    count = 0
    for bound, n in zip([*histogram.bounds, None], list(histogram.counts), strict=True):
        count += n
        buckets.append(("+Inf" if bound is None else repr(float(bound)), count))
    family.add_metric(labels, buckets, histogram.total)


def state_of(ready: bool, draining: bool, crashed: bool) -> str:
    """One of STATES."""
    if crashed:
        return "failed"
    if draining:
        return "draining"
    return "ready" if ready else "loading"


def resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc is not there."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class MetricsPage:
    """`page()` renders it; `serve()` puts it on a port of its own."""

    def __init__(self, engine: Engine, throughput: Throughput) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(engine, throughput))
        self._server: ThreadingHTTPServer | None = None

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def serve(self, host: str, port: int) -> int:
        """Answer GET /metrics until close(); returns the port. Raises AddressInUse."""
        page = self.page

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                found = self.path.split("?")[0] in ("/", "/metrics")
                body = page() if found else b"not found\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a scraper that went away

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"{host}:{port} (--scheduler-metrics-port) is taken. Choose another port, or "
                    "0 for no page."
                ) from None
            raise ConfigError(f"--scheduler-metrics-port {port}: {error}.") from None
        thread = threading.Thread(
            target=self._server.serve_forever, name="quire-metrics", daemon=True
        )
        thread.start()
        return int(self._server.server_address[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
