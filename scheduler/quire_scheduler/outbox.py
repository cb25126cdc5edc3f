"""Outbox: what the engine has yet to tell its clients, and the last word on each request.

Knows rows and counters; not clients, plans or workers. Success, failure and cancel of a request
are counted and traced here and nowhere else.
"""

from __future__ import annotations

import logging

from quire.errors import QuireError
from quire_scheduler.counters import Counters
from quire_scheduler.outputs import ERROR, LENGTH, Outputs, one_row
from quire_scheduler.request import Request

log = logging.getLogger("quire.scheduler")


class Outbox:
    """Outputs and ended requests pile up until the engine takes them."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._outputs: list[tuple[int, Outputs]] = []  # (client number, delivery)
        self._ended: list[Request] = []

    def put(self, outputs: list[tuple[int, Outputs]]) -> None:
        self._outputs += outputs

    def take(self) -> tuple[list[tuple[int, Outputs]], list[Request]]:
        """Deliveries in order, and the requests that ended with them."""
        taken = self._outputs, self._ended
        self._outputs, self._ended = [], []
        return taken

    def ended(self, request: Request, reason: int) -> None:
        """It is finished, and its last row was put."""
        self._counters.finish("length" if reason == LENGTH else "stop")
        request.span.set(
            quire__prompt_tokens=request.num_prompt_tokens,
            quire__output_tokens=request.num_output_tokens,
            quire__cached_tokens=max(request.num_cached_tokens, 0),
        )
        request.span.end()
        self._ended.append(request)

    def cut(self, request: Request) -> None:
        """It is finished by length without a further token."""
        self._outputs.append((request.client, _last_row(request, LENGTH)))
        self.ended(request, LENGTH)

    def failed(self, request: Request, error: QuireError) -> None:
        """It is finished by an error."""
        request.span.end(error.name)
        self._counters.finish("error")
        self._outputs.append((request.client, _last_row(request, ERROR, error)))
        self._ended.append(request)
        log.warning("request failed: %s", error.message, extra={"request_id": request.request_id})

    def cancelled(self, request: Request) -> None:
        """It is finished and nobody wants to hear of it."""
        request.span.end("cancelled")
        self._counters.finish("abort")


def _last_row(request: Request, reason: int, error: QuireError | None = None) -> Outputs:
    return one_row(
        request.handle,
        request.attempt,
        request.num_output_tokens,
        reason,
        num_cached_tokens=request.num_cached_tokens,
        deaths=request.deaths,
        error=error,
    )
