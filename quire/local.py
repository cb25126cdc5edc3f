"""LocalEngine: scheduler and worker as two threads of this process, no sockets.

The two exchange the same encoded frames as the services do, through a QueueLink. Knows
token ids; text is the business of quire.llm. Services are imported when one is made.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quire import telemetry
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.link import QueueLink
from quire.sampling import SamplingParams
from quire.v1 import common_pb2 as pb

if TYPE_CHECKING:
    from quire_scheduler.outputs import Outputs


@dataclass(frozen=True, slots=True)
class Event:
    """What one step brought one request."""

    token_ids: list[int]
    finish_reason: int  # common.proto FinishReason, 0 = goes on
    stop_token_id: int  # -1 = none
    num_cached_tokens: int
    logprobs: list[list[tuple[int, float]]]  # [num_tokens][1 + k], the sampled token first
    ranks: list[int]  # [num_tokens] of the sampled tokens; empty without logprobs
    error: QuireError | None
    embedding: list[float] | None  # [hidden_size], of a request that pools


MAX_WAITING = 1 << 20
Sink = Callable[[Event], None]


class LocalEngine:
    """An engine and its worker in this process. `close()` stops both threads.

    Mutable state: _sinks, touched under _lock by the caller's thread and the engine's.
    """

    def __init__(self, config: EngineConfig, start_timeout_s: float = 600.0) -> None:
        from quire_worker import backends

        backends.prepare_threads(config.num_threads)
        from quire_scheduler.engine import Engine
        from quire_worker import daemon
        from quire_worker.worker import Worker

        # Whoever calls holds the prompts already: a bound of the queue would only refuse its own.
        config = replace(config, max_waiting=MAX_WAITING, max_requests=0)
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._handles = itertools.count(1)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        worker = Worker(config)
        link = QueueLink()
        self.engine = Engine(config, link, tracer=telemetry.Tracer("local"))
        self.engine.start()

        def serve() -> None:
            try:
                daemon.serve(worker, link.worker(), self._stop)
            except BaseException as error:
                self._failure = error
                raise

        self._worker_thread = threading.Thread(target=serve, name="worker", daemon=True)
        self._worker_thread.start()
        deadline = time.monotonic() + start_timeout_s
        while not self.engine.stats().ready:
            if self._failure or not self.engine.alive or time.monotonic() > deadline:
                self.close()
                raise self._failure or QuireError("internal_error", "the worker said no hello.")
            time.sleep(0.002)
        model = self.engine.model()
        assert model is not None  # it is ready
        self.model = model

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str,
        pool: bool = False,
    ) -> int:
        """Queue one request (n = 1, seeded), for tokens or, with `pool`, for one vector; returns
        its handle. `sink` is called on the engine thread for each Event and must not block."""
        import numpy as np

        from quire_scheduler.request import Submission

        handle = next(self._handles)
        with self._lock:
            self._sinks[handle] = sink
        self.engine.submit(
            self,
            Submission(
                handle=handle,
                request_id=request_id,
                prompt_token_ids=np.asarray(prompt_token_ids, np.int32),
                params=params,
                kind=pb.REQUEST_KIND_POOL if pool else pb.REQUEST_KIND_GENERATE,
            ),
        )
        return handle

    def cancel(self, handle: int) -> None:
        """Forget a request; its blocks are freed before the next plan."""
        with self._lock:
            self._sinks.pop(handle, None)
        self.engine.cancel(self, handle, 0)

    def deliver(self, outputs: Outputs) -> None:
        """Split one delivery into events. Called by the engine's thread."""
        failures = {failure.handle: failure.error for failure in outputs.failures}
        pooled = {vector.handle: vector.embedding.tolist() for vector in outputs.pooled}
        tokens = outputs.token_ids.tolist()
        logprobs, ranks = _rows(outputs)
        start = 0
        for row, handle in enumerate(outputs.handles.tolist()):
            end = start + int(outputs.num_tokens[row])
            event = Event(
                token_ids=tokens[start:end],
                finish_reason=int(outputs.finish_reasons[row]),
                stop_token_id=int(outputs.stop_token_ids[row]),
                num_cached_tokens=int(outputs.num_cached_tokens[row]),
                logprobs=logprobs[start:end],
                ranks=ranks[start:end],
                error=failures.get(handle),
                embedding=pooled.get(handle),
            )
            start = end
            with self._lock:
                finished = event.finish_reason or event.error
                sink = self._sinks.pop(handle, None) if finished else self._sinks.get(handle)
            if sink is not None:
                sink(event)

    def close(self) -> None:
        """Stop both threads. What still runs is abandoned."""
        self.engine.stop()
        self._stop.set()
        self._worker_thread.join(timeout=30)

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._worker_thread.is_alive()


def _rows(outputs: Outputs) -> tuple[list[list[tuple[int, float]]], list[int]]:
    columns: Any = outputs.logprobs
    if columns is None:
        return [], []
    pairs = list(zip(columns.token_ids.tolist(), columns.logprobs.tolist(), strict=True))
    rows, start = [], 0
    for count in columns.counts.tolist():
        rows.append(pairs[start : start + count])
        start += count
    return rows, columns.ranks.tolist()
