"""Metrics: what the gateway counts, in a registry of its own.

Names follow Prometheus' rules (base units, _total, no colon); the four llm_engine_* names are
a fixed contract and keep their units. Knows no HTTP.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_MS = 0.001
# Resolve 1 ms where small models live, and still hold a long prefill.
TTFT_BUCKETS = [
    k * _MS
    for k in (
        1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750,
        1_000, 1_500, 2_000, 3_000, 5_000, 10_000, 20_000, 40_000, 80_000, 160_000,
    )
]  # fmt: skip
INTER_TOKEN_BUCKETS = [
    k * _MS
    for k in (
        0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200,
        300, 500, 1_000, 2_000, 5_000, 10_000,
    )
]  # fmt: skip
DURATION_BUCKETS = [
    k * _MS
    for k in (
        1, 2, 3, 5, 7, 10, 20, 30, 50, 75, 100, 200, 300, 500, 750, 1_000, 2_000, 3_000, 5_000,
        7_500, 10_000, 20_000, 30_000, 60_000, 120_000, 300_000, 600_000,
    )
]  # fmt: skip
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """One per app, so that several apps in one process do not share counts."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "quire_http_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self.requests = Counter(
            "quire_requests", "Sequences generated, by how they ended", ["finish_reason"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("quire_prompt_tokens", "Prompt tokens", registry=registry)
        self.generation_tokens = Counter(
            "quire_generation_tokens", "Output tokens", registry=registry
        )
        self.cached_tokens = Counter(
            "quire_cached_prompt_tokens", "Prompt tokens found in the prefix cache",
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "quire_requests_in_flight", "Generation requests being answered", registry=registry
        )
        self.refused_early = Counter(
            "quire_requests_refused_early", "Requests refused unread, as the scheduler had just "
            "refused others", registry=registry,
        )  # fmt: skip
        self.ttft = Histogram(
            "quire_request_time_to_first_token_seconds", "From a request's arrival to its first "
            "token at the gateway", buckets=TTFT_BUCKETS, registry=registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "quire_request_inter_token_seconds", "Between the tokens of one sequence",
            buckets=INTER_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "quire_request_duration_seconds", "From a generation request's arrival to its end",
            buckets=DURATION_BUCKETS, registry=registry,
        )  # fmt: skip
        self.engine_up = Gauge(
            "quire_engine_connected", "1 while the scheduler's stream is open", registry=registry
        )
        self.gateway_memory = Gauge(
            "quire_resident_memory_bytes", "Memory of this process", registry=registry
        )
        self.llm_requests = Counter(
            "llm_engine_requests", "Generation requests answered", registry=registry
        )
        self.llm_duration = Histogram(
            "llm_engine_request_duration_ms", "Duration of generation requests in milliseconds",
            buckets=[bucket / _MS for bucket in DURATION_BUCKETS], registry=registry,
        )  # fmt: skip
        self.llm_cache_hit_rate = Gauge(
            "llm_engine_cache_hit_rate", "Share of prompt tokens found in the prefix cache",
            registry=registry,
        )  # fmt: skip
        self.llm_memory = Gauge(
            "llm_engine_memory_usage_bytes", "Memory of gateway, scheduler and workers",
            registry=registry,
        )  # fmt: skip

    def page(self) -> bytes:
        """The registry in Prometheus' text format, without the _created series."""
        self.gateway_memory.set(resident_memory())
        lines = generate_latest(self.registry).splitlines(keepends=True)
        return b"".join(line for line in lines if not _is_created(line))

    def observe_tokens(self, arrival: float, count: int, since: float | None) -> None:
        """Output tokens of one message; since: when the sequence's last ones came (s)."""
        self.generation_tokens.inc(count)
        if since is not None:
            for _ in range(count):
                self.inter_token.observe((arrival - since) / count)


def _is_created(line: bytes) -> bool:
    words: Sequence[bytes] = line.split(None, 3)
    name = words[2] if words and words[0] == b"#" and len(words) > 2 else words[0] if words else b""
    return name.partition(b"{")[0].endswith(b"_created")


def resident_memory() -> int:
    """Bytes of RAM this process holds."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:  # no /proc: the peak is the best there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
