"""One request is one trace over three services."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from flow.conftest import Server
from flow.processes import QUIRE, Process, addresses, clean_environ, free_ports, post

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Sink(pb_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[tuple[str, str, str, str]] = queue.SimpleQueue()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    ids = (span.trace_id, span.span_id, span.parent_span_id)
                    self.spans.put((attributes["service.name"], *(i.hex() for i in ids)))
        return pb.ExportTraceServiceResponse()


@pytest.fixture
def sink() -> Iterator[tuple[Sink, str]]:
    sink = Sink()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(sink, server)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    server.add_insecure_port(address)
    server.start()
    yield sink, f"http://{address}"
    server.stop(None).wait()


def test_a_trace_runs_through_gateway_scheduler_and_worker(sink: tuple[Sink, str]) -> None:
    spans, endpoint = sink
    environ = {**addresses(), "QUIRE_OTLP_TRACES_ENDPOINT": endpoint}
    with Process([*QUIRE, "serve", "demo"], clean_environ(**environ)) as process:
        process.line("Ready in", timeout_s=90)
        server = Server(process, environ)
        status, _ = post(
            server.port,
            "/v1/completions",
            b'{"model":"demo","prompt":"hi","max_tokens":3}',
            headers={"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"},
        )
        assert status == 200
        found: dict[str, tuple[str, str]] = {}
        while len(found) < 3:
            service, trace_id, span_id, parent = spans.spans.get(timeout=15)
            if trace_id == TRACE_ID:
                found[service] = (span_id, parent)
    assert set(found) == {"quire-gateway", "quire-scheduler", "quire-worker"}
    assert found["quire-gateway"][1] == "00f067aa0ba902b7"
    assert found["quire-scheduler"][1] == found["quire-gateway"][0]
    assert found["quire-worker"][1] == found["quire-scheduler"][0]
