"""Intake: clients and their submissions, from the first check to the last row.

Knows clients, bounds and the answers to refusals; not frames, steps or blocks. Belongs to the
engine thread; `num_early` and the counters may be read from any.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.telemetry import Tracer
from quire_scheduler.admission import ModelInfo, accept
from quire_scheduler.counters import Counters
from quire_scheduler.outputs import ERROR, Client, Outputs, one_row
from quire_scheduler.request import Request, Submission

log = logging.getLogger("quire.scheduler")

U32 = 0xFFFFFFFF
MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True, eq=False)
class ClientState:
    """A client that has handed something in, until it is detached."""

    number: int
    client: Client
    requests: dict[int, Request] = field(default_factory=dict)  # by handle
    early: dict[int, Submission] = field(default_factory=dict)  # before a worker said Hello


class Intake:
    """`add` and `drop` are the driver's: a request accepted, a request cancelled."""

    def __init__(
        self,
        config: EngineConfig,
        counters: Counters,
        tracer: Tracer,
        add: Callable[[Request], None],
        drop: Callable[[Request], None],
    ) -> None:
        self._config, self._counters, self._tracer = config, counters, tracer
        self._add, self._drop = add, drop
        self._clients: dict[int, ClientState] = {}  # by id(client)
        self._by_number: dict[int, ClientState] = {}
        self._num_clients = 0
        self._arrivals = 0
        self.num_early = 0
        self._finish_times: deque[float] = deque(maxlen=64)
        self._reject_times: deque[float] = deque(maxlen=256)

    @property
    def num_live(self) -> int:
        """Requests accepted and not finished."""
        return self.num_early + sum(len(s.requests) for s in list(self._clients.values()))

    @property
    def live(self) -> list[Request]:
        return [r for s in self._clients.values() for r in s.requests.values()]

    def submit(
        self,
        client: Client,
        submission: Submission,
        model: ModelInfo | None,
        now: float,
        *,
        draining: bool,
    ) -> None:
        """Accept or answer with the failure. Never raises."""
        self._counters.received += 1
        state = self._clients.get(id(client))
        if state is None:
            self._num_clients += 1
            state = ClientState(self._num_clients, client)
            self._clients[id(client)] = state
            self._by_number[state.number] = state
        try:
            self._accept(state, submission, model, now, draining)
        except Exception as error:
            self._refuse(state, submission, error)

    def take_early(self, model: ModelInfo, now: float) -> None:
        """The model is known now: take what waited for it."""
        for state in list(self._clients.values()):
            early, state.early = state.early, {}
            self.num_early -= len(early)
            for submission in early.values():
                try:
                    self._accept(state, submission, model, now, False)
                except Exception as error:
                    self._refuse(state, submission, error)

    def cancel(self, client: Client, handle: int, attempt: int) -> None:
        state = self._clients.get(id(client))
        if state is None:
            return
        submission = state.early.get(handle)
        if submission is not None and submission.attempt <= attempt:
            del state.early[handle]
            self.num_early -= 1
        request = state.requests.get(handle)
        if request is not None and request.attempt <= attempt:
            del state.requests[handle]
            self._drop(request)

    def detach(self, client: Client) -> None:
        state = self._clients.pop(id(client), None)
        if state is None:
            return
        self.num_early -= len(state.early)
        del self._by_number[state.number]
        for request in state.requests.values():
            self._drop(request)

    def deliver(self, number: int, outputs: Outputs) -> None:
        """Rows for the client of this number, if it is still there."""
        state = self._by_number.get(number)
        if state is None:
            return
        try:
            state.client.deliver(outputs)
        except Exception:
            log.exception("a client could not take its outputs; its requests are cancelled")
            self.detach(state.client)

    def ended(self, request: Request, now: float) -> None:
        """Its last row was delivered."""
        self._finish_times.append(now)
        state = self._by_number.get(request.client)
        if state is not None and state.requests.get(request.handle) is request:
            del state.requests[request.handle]

    def check(self) -> None:
        assert set(self._clients) == {id(s.client) for s in self._by_number.values()}
        assert self.num_early == sum(len(s.early) for s in self._clients.values())

    def _accept(
        self,
        state: ClientState,
        submission: Submission,
        model: ModelInfo | None,
        now: float,
        draining: bool,
    ) -> None:
        handle, attempt = submission.handle, submission.attempt
        known = state.requests.get(handle) or state.early.get(handle)
        if known is not None:
            if known.attempt >= attempt:
                return  # a duplicate
            self.cancel(state.client, handle, attempt)
        replay = attempt > 0 or len(submission.output_token_ids) > 0
        if draining and not replay:
            raise QuireError("draining", "The server is shutting down.", retry_after_s=1.0)
        self._check_room(now, replay)
        if model is None:
            state.early[handle] = submission
            self.num_early += 1
            return
        request = accept(
            submission,
            state.client,
            state.number,
            model,
            self._tracer,
            arrival=self._arrivals,
            now=now,
            use_priority=self._config.scheduling_policy == "priority",
        )
        self._arrivals += 1
        if isinstance(request, Outputs):
            self.deliver(state.number, request)
            return
        self._counters.accepted += 1
        state.requests[handle] = request
        self._add(request)

    def _check_room(self, now: float, replay: bool) -> None:
        """Raise queue_full. A resubmission was accepted before: it is not turned away, but for a
        bound far beyond what a gateway can hold."""
        config, live = self._config, self.num_live
        room = config.max_num_seqs + config.max_waiting
        if config.max_requests:
            room = min(room, config.max_requests)
        if live < (4 * room + 1024 if replay else room):
            return
        self._reject_times.append(now)
        raise QuireError(
            "queue_full",
            f"{live} requests are running or waiting, which is the limit. Try again later.",
            retry_after_s=self._retry_after(now),
        )

    def _retry_after(self, now: float) -> float:
        """Seconds until there is a place for this request and those refused within the last
        second, at the rate at which requests have been finishing."""
        times = self._finish_times
        span = now - times[0] if times else 0.0
        if len(times) < 2 or span <= 0:
            return 1.0
        rivals = sum(1 for t in self._reject_times if now - t < 1.0)
        return min(max(rivals * span / len(times), 0.05), MAX_RETRY_AFTER_S)

    def _refuse(self, state: ClientState, submission: Submission, error: Exception) -> None:
        if not isinstance(error, QuireError):
            log.exception("a submission broke", extra={"request_id": submission.request_id})
            error = QuireError("internal_error", "The scheduler could not take the request.")
        self._counters.reject(error.name)
        row = one_row(
            submission.handle & U32,
            submission.attempt & U32,
            len(submission.output_token_ids),
            ERROR,
            deaths=submission.deaths & U32,
            error=error,
        )
        self.deliver(state.number, row)
