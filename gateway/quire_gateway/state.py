"""Gateway: what all handlers share.

One per app, touched only on the event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.telemetry import Tracer
from quire.v1 import engine_pb2
from quire_gateway.engine_client import EngineClient
from quire_gateway.metrics import Metrics
from quire_gateway.openai.ask import Limits
from quire_gateway.text import TextModel

RETRY_LOADING = 2.0  # s, told to clients while the server is not ready


class Gateway:
    """The gateway is ready when `text` is loaded, the engine is attached and it does not
    drain. `active` counts the generation requests being answered."""

    def __init__(self, config: EngineConfig, text: TextModel | None = None) -> None:
        self.config = config
        self.text = text
        self.engine = EngineClient(config.engine_address, config.reconnect_timeout)
        self.metrics = Metrics()
        self.tracer = Tracer("gateway", config.otlp_traces_endpoint)
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="text")
        self.created = int(time.time())
        self.started = time.monotonic()
        self.draining = False
        self.total_requests = 0
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    # -- generation requests
    def enter(self) -> None:
        """A generation request begins. Raises 'draining', 'not_ready' or 'queue_full', before
        any work is done for it."""
        if self.draining:
            raise QuireError("draining", "The server is shutting down.", retry_after_s=1.0)
        self.ready_text()
        try:
            self.engine.room.check(time.monotonic())
        except QuireError:
            self.metrics.refused_early.inc()
            raise
        self.total_requests += 1
        self.active += 1
        self.idle.clear()
        self.metrics.in_flight.set(self.active)

    def leave(self) -> None:
        """The request that entered has ended, one way or another."""
        self.active -= 1
        self.metrics.in_flight.set(self.active)
        if self.active == 0:
            self.idle.set()

    # -- readiness
    @property
    def waits_for(self) -> str:
        """What keeps it from serving, in words; "" when nothing does."""
        if self.text is None:
            return "loading the tokenizer"
        return "" if self.engine.model is not None else self.engine.status

    def ready_text(self) -> tuple[TextModel, engine_pb2.GetModelResponse]:
        """The loaded text model and what the engine serves. Raises 'not_ready' before that."""
        if self.text is None or self.engine.model is None:
            raise QuireError(
                "not_ready", f"The model is loading: {self.waits_for}.",
                retry_after_s=RETRY_LOADING,
            )  # fmt: skip
        return self.text, self.engine.model

    def limits(self) -> Limits:
        """What requests may ask for. Raises 'not_ready'."""
        text, model = self.ready_text()
        return Limits(
            model_names=self.config.model_names,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            max_prompts=self.config.max_prompts,
            sampling_defaults=text.defaults.sampling,
        )

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones; False when time ran out."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self.idle.wait()
        except TimeoutError:
            return False
        return True
