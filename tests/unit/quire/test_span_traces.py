"""Spans: silent without an endpoint, one trace over services with one."""

from __future__ import annotations

from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as stubs

from quire import telemetry

PARENT = ("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01", "vendor=1")


def test_without_an_endpoint_a_span_passes_its_parent_on() -> None:
    tracer = telemetry.Tracer("gateway")
    span = tracer.span("request", PARENT, "server")
    span.set(tokens=1)
    span.end()
    tracer.shutdown()
    assert span.context == PARENT


class Sink(stubs.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]
        return trace.ExportTraceServiceResponse()


@pytest.fixture
def sink():
    server = grpc.server(futures.ThreadPoolExecutor(2))
    found = Sink()
    stubs.add_TraceServiceServicer_to_server(found, server)
    found.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield found
    server.stop(None).wait()


def test_spans_of_two_services_are_one_trace(sink: Sink) -> None:
    gateway = telemetry.Tracer("gateway", f"http://127.0.0.1:{sink.port}")
    worker = telemetry.Tracer("worker", f"http://127.0.0.1:{sink.port}")
    outer = gateway.span("request", PARENT, "server", {"model": "demo"})
    inner = worker.span("prefill", outer.context)
    inner.set(gen_ai__tokens=3)
    inner.end("numeric_error")
    outer.end()
    gateway.shutdown()
    worker.shutdown()
    by_service = dict(sink.spans)
    first, second = by_service["quire-gateway"], by_service["quire-worker"]
    assert first.trace_id == second.trace_id == bytes.fromhex("ab" * 16)
    assert first.parent_span_id == bytes.fromhex("cd" * 8)
    assert second.parent_span_id == first.span_id
    assert second.status.code == 2
    keys = {a.key for a in second.attributes}
    assert keys == {"gen_ai.tokens", "error.type"}
