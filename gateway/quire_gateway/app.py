"""The aiohttp application: routes and middleware, nothing else.

Knows neither sockets nor signals; main.py runs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from quire_gateway import health
from quire_gateway.auth import KeyRing
from quire_gateway.http import GATEWAY, KEYS, middleware, on_prepare
from quire_gateway.openai.chat import read_chat
from quire_gateway.openai.completions import read_completion
from quire_gateway.openai.shapes import ChatShape, CompletionShape
from quire_gateway.serve import Endpoint, handler
from quire_gateway.state import Gateway

CHAT = Endpoint("chat", read_chat, ChatShape)
COMPLETIONS = Endpoint("text_completion", read_completion, CompletionShape)
# How aiohttp serves it: a disconnect cancels the handler, and with it the generation.
RUNNER_OPTIONS: dict[str, Any] = {
    "handler_cancellation": True,
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": 75.0,
    "shutdown_timeout": 1.0,
}


def build(gateway: Gateway) -> web.Application:
    """The application. Starting it starts the gateway's engine client."""
    app = web.Application(middlewares=[middleware], client_max_size=gateway.config.max_body_bytes)
    app[GATEWAY] = gateway
    app[KEYS] = KeyRing(gateway.config.api_key)
    app.on_response_prepare.append(on_prepare)
    app.cleanup_ctx.append(_engine)
    app.router.add_post("/v1/chat/completions", handler(CHAT))
    app.router.add_post("/v1/completions", handler(COMPLETIONS))
    app.router.add_get("/v1/models", health.models)
    app.router.add_get("/v1/models/{id:.+}", health.model)
    app.router.add_get("/health", health.health)
    app.router.add_get("/ready", health.ready)
    app.router.add_get("/ping", health.ping)
    app.router.add_get("/metrics", health.metrics)
    app.router.add_get("/version", health.version)
    return app


async def _engine(app: web.Application) -> AsyncIterator[None]:
    gateway = app[GATEWAY]
    await gateway.engine.start()
    yield
    await gateway.engine.close()
    gateway.threads.shutdown(wait=False, cancel_futures=True)
    gateway.tracer.shutdown()
