"""Operational routes: health, readiness, liveness, metrics, version, models.

Knows no generation.
"""

from __future__ import annotations

import time

from aiohttp import web

from quire.errors import InvalidRequest
from quire.v1 import engine_pb2
from quire.version import __version__
from quire_gateway.http import GATEWAY, json_response
from quire_gateway.metrics import resident_memory
from quire_gateway.openai.body import shown
from quire_gateway.pages import merge
from quire_gateway.state import Gateway

_LOADING = "loading"


async def ping(request: web.Request) -> web.Response:
    """Liveness: the event loop turns."""
    return json_response({"status": "ok"})


async def version(request: web.Request) -> web.Response:
    return json_response({"version": __version__})


async def ready(request: web.Request) -> web.Response:
    """Readiness: 200 when a request sent now would be served."""
    gateway = request.app[GATEWAY]
    status, problem = await _status(gateway, await gateway.engine.recent_load())
    if status == "ok":
        return json_response({"status": "ready"})
    return json_response({"status": status, "problem": problem}, 503)


async def health(request: web.Request) -> web.Response:
    """The story: status, and the figures an operator looks at first."""
    gateway = request.app[GATEWAY]
    load = await gateway.engine.recent_load()
    status, problem = await _status(gateway, load)
    body = {
        "status": status,
        "uptime_seconds": round(time.monotonic() - gateway.started, 3),
        "total_requests": gateway.total_requests,
        "cache_hit_rate": round(_hit_rate(load), 6),
        "memory_usage_mb": round(_memory(load) / (1 << 20), 1),
    }
    if problem:
        body["problem"] = problem
    return json_response(body, 200 if status == "ok" else 503)


async def metrics(request: web.Request) -> web.Response:
    """The gateway's page with those of scheduler and workers, each sample labelled by its
    service. Without the scheduler it is the gateway's alone."""
    gateway = request.app[GATEWAY]
    load = await gateway.engine.get_load()
    own = gateway.metrics
    own.engine_up.set(gateway.engine.connected)
    own.llm_cache_hit_rate.set(_hit_rate(load))
    own.llm_memory.set(_memory(load))
    pages = [("gateway", own.page().decode())]
    if load is not None:
        pages += [(page.service, page.text.decode("utf-8", "replace")) for page in load.metrics]
    return web.Response(
        body=merge(pages).encode(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    data = [_model(gateway, name) for name in gateway.config.model_names]
    return json_response({"object": "list", "data": data})


async def model(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    name = request.match_info["id"]
    if name not in gateway.config.model_names:
        raise InvalidRequest(f"The model {shown(name)} does not exist.", "model", "model_not_found")
    return json_response(_model(gateway, name))


def _model(gateway: Gateway, name: str) -> dict[str, object]:
    served = gateway.engine.model
    return {
        "id": name,
        "object": "model",
        "created": gateway.created,
        "owned_by": "quire",
        "root": gateway.config.model,
        "parent": None,
        "max_model_len": served.max_model_len if served else None,
        "permission": [],
    }


async def _status(gateway: Gateway, load: engine_pb2.GetLoadResponse | None) -> tuple[str, str]:
    """(ok | loading | draining | unhealthy, what is wrong)."""
    if gateway.draining:
        return "draining", "the server is shutting down"
    if gateway.waits_for:
        return _LOADING, gateway.waits_for
    if load is None or not gateway.engine.connected:
        return "unhealthy", gateway.engine.status or "the scheduler does not answer"
    if load.draining:
        return "draining", "the scheduler is shutting down"
    if not load.healthy:
        return "unhealthy", load.problem or "the engine is not healthy"
    return "ok", ""


def _hit_rate(load: engine_pb2.GetLoadResponse | None) -> float:
    if load is None or not load.prefix_query_tokens:
        return 0.0
    return load.prefix_hit_tokens / load.prefix_query_tokens


def _memory(load: engine_pb2.GetLoadResponse | None) -> int:
    return resident_memory() + (load.memory_bytes if load else 0)
