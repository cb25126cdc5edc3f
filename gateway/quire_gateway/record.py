"""RequestRecord: what is written down about one HTTP request.

Filled in while the request is served, and read once at its end for the log line, the metrics
and the span. Knows no HTTP library.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.telemetry import NO_CONTEXT, Context, Span

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(r"[\x20-\x7e]{0,512}")


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are time.monotonic() seconds, as the event loop's are."""

    request_id: str  # echoed in x-request-id: the client's label, or ours
    internal_id: str  # unique, whatever the client sent
    method: str
    route: str = "unmatched"
    parent: Context = NO_CONTEXT  # of the trace
    span: Span = field(default_factory=lambda: Span(NO_CONTEXT))
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    status: int = 0
    is_generation: bool = False
    tenant: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    error: str = ""  # name of the error it ended with

    @property
    def duration(self) -> float:
        return time.monotonic() - self.started

    def log_fields(self) -> dict[str, object]:
        """The fields of the request's one log line."""
        first = self.first_token
        return {
            "request_id": self.request_id,
            "duration_ms": round(self.duration * 1000, 3),
            "tokens": self.tokens,
            "status": self.status,
            "route": self.route,
            "finish_reason": self.finish_reason,
            "ttft_ms": None if first is None else round((first - self.started) * 1000, 3),
            **({"error": self.error} if self.error else {}),
        }


def begin(method: str, headers: Mapping[str, str]) -> RequestRecord:
    """The record of a request that has just arrived."""
    made = "req-" + secrets.token_hex(12)
    label = headers.get("x-request-id", "")
    if not _REQUEST_ID.fullmatch(label):
        label = made
    internal = made if label == made else f"{label}-{secrets.token_hex(4)}"
    record = RequestRecord(label, internal, method)
    traceparent = headers.get("traceparent", "")
    tracestate = headers.get("tracestate", "")
    if _TRACEPARENT.fullmatch(traceparent):
        good = _TRACESTATE.fullmatch(tracestate)
        record.parent = (traceparent, tracestate if good else "")
    return record
