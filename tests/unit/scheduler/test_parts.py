"""The small parts: waiting queue, outputs, pace, metrics page."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sched_helpers import Rig

from fakes.worker import Options
from quire.errors import AddressInUse, QuireError
from quire.v1 import engine_pb2
from quire_scheduler.metrics import MetricsPage
from quire_scheduler.outputs import ERROR, Logprobs, Outputs, merge, one_row
from quire_scheduler.throughput import Throughput
from quire_scheduler.waiting import WaitingQueue


def waiter(arrival: int, priority: int = 0, resumed: bool = False) -> SimpleNamespace:
    class Item(SimpleNamespace):
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    return Item(arrival=arrival, priority=priority, resumed=resumed)


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while queue.first(1):
        request = queue.first(1)[0]
        queue.discard(request)
        order.append(request.arrival)
    return order


def test_first_come_first_served_but_preempted_before_all():
    queue = WaitingQueue("fcfs")
    for item in (waiter(3), waiter(1), waiter(2, priority=-9), waiter(4, resumed=True)):
        queue.push(item)
    assert drain(queue) == [4, 1, 2, 3]


def test_priority_goes_before_arrival():
    queue = WaitingQueue("priority")
    for item in (waiter(1, 5), waiter(2, 1), waiter(3, 1, resumed=True), waiter(4, 0)):
        queue.push(item)
    assert drain(queue) == [4, 3, 2, 1]


def test_what_is_discarded_leaves_and_may_come_back():
    queue = WaitingQueue()
    items = [waiter(i) for i in range(500)]
    for item in items:
        queue.push(item)
    for item in items[:490]:
        queue.discard(item)
    queue.discard(items[0])
    assert len(queue) == 10 and items[0] not in queue
    queue.push(items[3])
    assert [r.arrival for r in queue.first(3)] == [3, 490, 491]
    assert [r.arrival for r in queue.first(3)] == [3, 490, 491]


def tokens_row(handle: int, tokens: list[int], logprobs: Logprobs | None = None) -> Outputs:
    row = one_row(handle, 0, 3, 0)
    return Outputs(
        handles=row.handles,
        attempts=row.attempts,
        first_indices=row.first_indices,
        num_tokens=np.array([len(tokens)], np.uint32),
        token_ids=np.array(tokens, np.int32),
        finish_reasons=row.finish_reasons,
        stop_token_ids=row.stop_token_ids,
        num_cached_tokens=row.num_cached_tokens,
        deaths=row.deaths,
        logprobs=logprobs,
    )


def test_merged_outputs_keep_order_and_logprobs():
    some = Logprobs(
        np.array([2], np.uint32),
        np.array([5, 6], np.int32),
        np.array([-1.0, -2.0], np.float32),
        np.array([1], np.uint32),
    )
    error = QuireError("queue_full", "full", retry_after_s=2.0)
    parts = [
        tokens_row(1, [5], some),
        tokens_row(2, [7, 8]),
        one_row(3, 1, 0, ERROR, error=error),
    ]
    message = merge(parts).to_proto()
    assert np.frombuffer(message.handles, "<u4").tolist() == [1, 2, 3]
    assert np.frombuffer(message.token_ids, "<i4").tolist() == [5, 7, 8]
    assert np.frombuffer(message.logprobs.counts, "<u4").tolist() == [2, 0, 0]
    assert message.failures[0].error.name == "queue_full"
    assert message.failures[0].error.retry_after_s == 2.0
    assert isinstance(message, engine_pb2.AttachResponse)


def page_of_a_run() -> MetricsPage:
    rig = Rig(Options(num_blocks=9, max_slots=4))
    for i in range(4):
        rig.submit([7 + i] * 20, max_tokens=60)
    rig.submit([])
    rig.run()
    rig.link.num_malformed = 3
    return MetricsPage(rig.engine, Throughput(rig.engine))


def test_the_metrics_page_says_what_happened():
    text = page_of_a_run().page().decode()
    values = {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if "le" not in s.labels
    }
    assert values["quire_output_tokens_total",] == 240
    assert values["quire_scheduler_requests_total", "length"] == 4
    assert values["quire_scheduler_rejects_total", "invalid_request"] == 1
    assert values["quire_preemptions_total", "recompute"] > 0
    assert values["quire_preemptions_total", "offload"] == 0
    assert values["quire_recomputed_tokens_total",] > 0
    assert 0 < values["quire_recomputed_tokens_ratio",] < 1
    assert values["quire_kv_blocks_used",] == 0
    assert values["quire_requests_limit",] == 256 + 4096
    assert values["quire_prefix_cache_evicted_blocks_total",] > 0
    assert values["quire_prefix_cache_grafted_blocks_total",] == 0
    assert values["quire_frames_dropped_total", "malformed"] == 3
    assert values["quire_engine_state", "ready"] == 1
    steps = values["quire_scheduler_steps_total",]
    parts = ("plan", "wire", "queue", "prepare", "forward", "sample", "idle")
    assert all(values["quire_step_part_seconds_count", part] >= steps for part in parts)
    assert values["quire_step_requests_count",] > 0


def test_the_metrics_page_keeps_the_exposition_rules():
    text = page_of_a_run().page().decode()
    seen: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.name not in seen and family.documentation
        seen.add(family.name)
        assert family.name.startswith("quire_")
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)
        if family.type == "histogram":
            for sample in family.samples:
                if sample.labels.get("le") == "+Inf":
                    rest = {k: v for k, v in sample.labels.items() if k != "le"}
                    count = [
                        s.value
                        for s in family.samples
                        if s.name.endswith("_count") and s.labels == rest
                    ]
                    assert count == [sample.value]
    if shutil.which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=text.encode(), check=True)


def test_the_metrics_port_answers_and_a_taken_one_is_an_error():
    page, other = page_of_a_run(), page_of_a_run()
    try:
        port = page.serve("127.0.0.1", 0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"quire_requests_running" in answer.read()
        with pytest.raises(AddressInUse, match="--scheduler-metrics-port"):
            other.serve("127.0.0.1", port)
    finally:
        page.close()
        other.close()
