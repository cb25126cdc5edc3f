"""Traces: one trace over three services, when an OTLP endpoint is set.

A span's context travels as the two W3C header values (HTTP header, gRPC metadata,
TraceContext field). Without an endpoint spans do nothing and pass their parent on.
OpenTelemetry is imported only when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ConfigError
from quire.version import __version__

Context = tuple[str, str]  # traceparent, tracestate; "" = absent
Value = str | int | float | bool

NO_CONTEXT: Context = ("", "")


class Span:
    """A span that records nothing; `context` is what its children get."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def set(self, **attributes: Value) -> None:
        """Add attributes; dots in their names are written as double underscores."""

    def end(self, error: str = "") -> None:
        """Close it, as failed when error (an error name) is given."""


class Tracer:
    """Makes spans of one service. With an empty endpoint they record nothing."""

    def __init__(self, service: str, endpoint: str = "") -> None:
        self._provider: Any = None
        if endpoint:
            self._provider = _provider(service, endpoint)
            self._tracer = self._provider.get_tracer("quire", __version__)

    def span(
        self,
        name: str,
        parent: Context = NO_CONTEXT,
        kind: str = "internal",
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        """Start a span under `parent`. kind: internal, server, client, producer or consumer."""
        if self._provider is None:
            return Span(parent)
        return _RecordedSpan(self._tracer, name, parent, kind, dict(attributes or {}))

    def shutdown(self) -> None:
        """Send what is pending and stop."""
        if self._provider is not None:
            self._provider.shutdown()


class _RecordedSpan(Span):
    def __init__(
        self, tracer: Any, name: str, parent: Context, kind: str, attributes: dict[str, Value]
    ) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        above = propagator.extract({"traceparent": parent[0], "tracestate": parent[1]})
        self._span = tracer.start_span(
            name, context=above, kind=SpanKind[kind.upper()], attributes=attributes
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, context=set_span_in_context(self._span))
        super().__init__((carrier.get("traceparent", ""), carrier.get("tracestate", "")))

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes({k.replace("__", "."): v for k, v in attributes.items()})

    def end(self, error: str = "") -> None:
        from opentelemetry.trace import StatusCode

        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _provider(service: str, endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install 'quire[otlp]'."
        ) from None
    resource = Resource.create({"service.name": f"quire-{service}", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    return provider
