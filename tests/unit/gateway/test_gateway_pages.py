"""Merging Prometheus pages."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from quire_gateway.metrics import Metrics
from quire_gateway.pages import merge


def test_families_are_joined_and_labelled() -> None:
    first = '# HELP a_total A\n# TYPE a_total counter\na_total 1\na_total{x="1"} 2\n'
    second = "# HELP a_total other\n# TYPE a_total counter\na_total{} 3 1700000000\n"
    assert merge([("one", first), ("two", second)]) == (
        "# HELP a_total A\n# TYPE a_total counter\n"
        'a_total{service="one"} 1\na_total{service="one",x="1"} 2\n'
        'a_total{service="two"} 3 1700000000\n'
    )


def test_histograms_stay_whole() -> None:
    page = (
        "# TYPE h_seconds histogram\n"
        'h_seconds_bucket{le="1"} 1\nh_seconds_bucket{le="+Inf"} 1\nh_seconds_sum 0.5\n'
        "h_seconds_count 1\n"
    )
    merged = merge([("one", page), ("two", page)])
    assert merged.count("# TYPE") == 1
    (family,) = text_string_to_metric_families(merged)
    assert len(family.samples) == 8


def test_type_conflicts_and_rubbish_are_left_out() -> None:
    page = merge(
        [
            ("one", "# TYPE a gauge\na 1\n"),
            ("two", "# TYPE a counter\na 2\n<html>\n# a comment\n\nb 3\n"),
            ("three", '# TYPE c gauge\nc{service="own"} 1\nc{x="a,service=",service="b"} 1\n'),
        ]
    )
    assert 'a{service="one"} 1' in page and 'a{service="two"}' not in page
    assert 'b{service="two"} 3' in page and "html" not in page
    assert 'c{service="own"} 1' in page and 'c{x="a,service=",service="b"} 1' in page


def test_own_page_parses() -> None:
    metrics = Metrics()
    metrics.http_requests.labels("/x", "200").inc()
    metrics.observe_tokens(2.0, 2, 1.0)
    merged = merge([("gateway", metrics.page().decode())])
    families = {f.name: f for f in text_string_to_metric_families(merged)}
    assert families["quire_http_requests"].samples[0].labels["service"] == "gateway"
    inter = families["quire_request_inter_token_seconds"].samples
    assert next(s.value for s in inter if s.name.endswith("_sum")) == 1.0


def test_buckets_resolve_a_millisecond() -> None:
    page = Metrics().page().decode()
    for name in ("time_to_first_token", "inter_token", "duration"):
        for bound in ("0.001", "0.002"):
            assert f'quire_request_{name}_seconds_bucket{{le="{bound}"}}' in page
