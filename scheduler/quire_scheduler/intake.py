"""Intake: clients and their submissions, from the first check to the last row.

Knows clients, bounds and the answers to refusals; not frames, steps or blocks. Belongs to the
engine thread; `num_live`, `num_early` and the counters may be read from any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.config import EngineConfig
from quire.errors import InvalidRequest, QuireError
from quire.telemetry import Tracer
from quire.turnover import Turnover
from quire_scheduler.admission import ModelInfo, accept
from quire_scheduler.counters import Counters
from quire_scheduler.outputs import ERROR, Client, Outputs, one_row
from quire_scheduler.request import Request, Submission

log = logging.getLogger("quire.scheduler")

U32 = 0xFFFFFFFF


@dataclass(slots=True, eq=False)
class ClientState:
    """A client that has handed something in, until it is detached."""

    number: int
    client: Client
    requests: dict[int, Request] = field(default_factory=dict)  # by handle
    early: dict[int, Submission] = field(default_factory=dict)  # before a worker said Hello
    num_refused: int = 0  # submissions to come whose first one was refused, and why
    refusal: QuireError | None = None


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
        self.num_live = 0  # accepted or early, and not finished
        self.num_early = 0
        self.room = config.max_num_seqs + config.max_waiting  # most live requests
        if config.max_requests:
            self.room = min(self.room, config.max_requests)
        self._turnover = Turnover()

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
            if self._is_new(state, submission, now, draining):
                self._accept(state, submission, model, now)
        except Exception as error:
            self._refuse(state, submission, error, now)

    def take_early(self, model: ModelInfo, now: float) -> None:
        """The model is known now: take what waited for it."""
        for state in list(self._clients.values()):
            early, state.early = state.early, {}
            self.num_early -= len(early)
            self.num_live -= len(early)
            for submission in early.values():
                try:
                    self._accept(state, submission, model, now)
                except Exception as error:
                    self._refuse(state, submission, error, now)

    def cancel(self, client: Client, handle: int, attempt: int, now: float) -> None:
        state = self._clients.get(id(client))
        if state is None:
            return
        submission = state.early.get(handle)
        if submission is not None and submission.attempt <= attempt:
            del state.early[handle]
            self.num_early -= 1
            self._leave(1, now)
        request = state.requests.get(handle)
        if request is not None and request.attempt <= attempt:
            del state.requests[handle]
            self._leave(1, now)
            self._drop(request)

    def detach(self, client: Client, now: float) -> None:
        state = self._clients.pop(id(client), None)
        if state is None:
            return
        self.num_early -= len(state.early)
        self._leave(len(state.early) + len(state.requests), now)
        del self._by_number[state.number]
        for request in state.requests.values():
            self._drop(request)

    def deliver(self, number: int, outputs: Outputs, now: float) -> None:
        """Rows for the client of this number, if it is still there."""
        state = self._by_number.get(number)
        if state is None:
            return
        try:
            state.client.deliver(outputs)
        except Exception:
            log.exception("a client could not take its outputs; its requests are cancelled")
            self.detach(state.client, now)

    def ended(self, request: Request, now: float) -> None:
        """Its last row was delivered."""
        state = self._by_number.get(request.client)
        if state is not None and state.requests.get(request.handle) is request:
            del state.requests[request.handle]
            self._leave(1, now)

    def check(self) -> None:
        assert set(self._clients) == {id(s.client) for s in self._by_number.values()}
        states = self._clients.values()
        assert self.num_early == sum(len(s.early) for s in states)
        assert self.num_live == self.num_early + sum(len(s.requests) for s in states)

    def _is_new(
        self, state: ClientState, submission: Submission, now: float, draining: bool
    ) -> bool:
        """False for a duplicate; an older attempt makes way. Raises when there is no room."""
        handle, attempt = submission.handle, submission.attempt
        known = state.requests.get(handle) or state.early.get(handle)
        if known is not None:
            if known.attempt >= attempt:
                return False
            self.cancel(state.client, handle, attempt, now)
        replay = attempt > 0 or len(submission.output_token_ids) > 0
        if draining and not replay:
            raise QuireError("draining", "The server is shutting down.", retry_after_s=1.0)
        if not replay:
            self._follow(state, submission)
        try:
            self._check_room(submission.num_more, now, replay)
        except QuireError as error:
            state.num_refused, state.refusal = submission.num_more, error
            raise
        return True

    def _follow(self, state: ClientState, submission: Submission) -> None:
        """Raise what the first submission of its client request was refused with."""
        expected, state.num_refused = state.num_refused - 1, 0
        if expected >= 0 and submission.num_more == expected and state.refusal is not None:
            state.num_refused = expected
            raise state.refusal.with_traceback(None)

    def _accept(
        self, state: ClientState, submission: Submission, model: ModelInfo | None, now: float
    ) -> None:
        if model is None:
            state.early[submission.handle] = submission
            self.num_early += 1
            self._enter(now)
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
            self.deliver(state.number, request, now)
            return
        self._counters.accepted += 1
        state.requests[submission.handle] = request
        self._enter(now)
        self._add(request)

    def _check_room(self, num_more: int, now: float, replay: bool) -> None:
        """Raise unless there is room for this request and those that follow with it. One that was
        accepted before is not turned away, but for a bound far beyond what a gateway can hold."""
        wanted = 1 if replay else 1 + num_more  # once the first is in, the others fit
        if wanted > self.room:
            raise InvalidRequest(
                f"{wanted} sequences are asked for at once; at most {self.room} can run and wait "
                "here (--max-num-seqs + --max-waiting, --max-requests). Ask for fewer.",
                "n",
            )
        if self.num_live + wanted <= (4 * self.room + 1024 if replay else self.room):
            return
        raise QuireError(
            "queue_full",
            f"{self.num_live} requests are running or waiting; the limit is {self.room}. "
            "Try again later.",
            retry_after_s=self._turnover.retry_after(now, wanted),
        )

    def _enter(self, now: float) -> None:
        self.num_live += 1
        if self.num_live >= min(self.room, self._config.max_num_seqs):
            self._turnover.busy(now)

    def _leave(self, count: int, now: float) -> None:
        self.num_live -= count
        for _ in range(count):
            self._turnover.freed(now)
        if self.num_live < min(self.room, self._config.max_num_seqs):
            self._turnover.rest(now)

    def _refuse(
        self, state: ClientState, submission: Submission, error: Exception, now: float
    ) -> None:
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
        self.deliver(state.number, row, now)
