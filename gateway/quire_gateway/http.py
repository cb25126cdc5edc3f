"""HTTP manners common to all routes: bodies, errors, ids, keys, the record of each request.

Every answer to a request that parsed leaves through `middleware`. Knows no route's business.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from quire.errors import KINDS, QuireError
from quire_gateway import record as records
from quire_gateway.auth import KeyRing
from quire_gateway.openai.shapes import dumps
from quire_gateway.record import RequestRecord
from quire_gateway.state import Gateway

log = logging.getLogger(__name__)

GATEWAY = web.AppKey("gateway", Gateway)
KEYS = web.AppKey("keys", KeyRing)
RECORD = web.RequestKey("record", RequestRecord)
BODY_TIMEOUT = 60.0  # s for the whole body to arrive
MAX_MESSAGE = 4000  # characters of an error message
_BY_STATUS = {
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout",
    413: "payload_too_large", 415: "unsupported_media_type",
}  # fmt: skip
_QUIET = frozenset({"/health", "/ready", "/ping", "/metrics"})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_body(request: web.Request, limit: int) -> bytes:
    """The body. Raises QuireError for one that is encoded, too large, of another media type or
    too slow; a body over the limit is never read whole."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise QuireError(
            "unsupported_media_type",
            f"Content-Encoding {encoding[:32]!r} is not taken; send the body as it is.",
        )
    kind = request.content_type
    if "Content-Type" in request.headers and kind != "application/json" and "+json" not in kind:
        raise QuireError(
            "unsupported_media_type",
            f"Content-Type must be application/json, not {kind[:64]!r}.",
        )
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except TimeoutError:
        raise QuireError(
            "request_timeout", f"The body did not arrive within {BODY_TIMEOUT:g} s."
        ) from None


def _too_large(limit: int) -> QuireError:
    return QuireError("payload_too_large", f"The body is larger than {limit} bytes.")


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(body=dumps(value).encode(), status=status, content_type="application/json")


def error_response(error: QuireError) -> web.Response:
    """The answer for an error, with the headers that tell clients whether to try again."""
    body = error.to_openai()
    body["error"]["message"] = error.message[:MAX_MESSAGE]
    response = json_response(body, error.kind.status)
    if error.kind.retry:
        wait = error.retry_after_s or 1.0
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
        response.headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    else:
        response.headers["x-should-retry"] = "false"
    if error.kind.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.kind.status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        response.force_close()  # the rest of the body is not wanted
    return response


def internal_error(record: RequestRecord) -> QuireError:
    """For what nobody expected: no words of the exception reach the client."""
    return QuireError(
        "internal_error", f"Internal error; the server's log has it as {record.request_id}."
    )


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Wraps every request: id, span, key, errors, log line, metrics."""
    gateway = request.app[GATEWAY]
    record = request[RECORD] = records.begin(request.method, request.headers)
    resource = request.match_info.route.resource
    if resource is not None:
        record.route = resource.canonical
    record.span = gateway.tracer.span(
        f"{request.method} {record.route}", record.parent, "server",
        {"http.request.method": request.method, "http.route": record.route},
    )  # fmt: skip
    try:
        response = await _answer(request, handler, record)
        record.status = response.status
        return response
    except asyncio.CancelledError:
        record.status, record.error = KINDS["cancelled"].status, "cancelled"
        raise
    finally:
        _finish(gateway, record)


async def _answer(
    request: web.Request, handler: Handler, record: RequestRecord
) -> web.StreamResponse:
    try:
        record.tenant = request.app[KEYS].check(request.path, request.headers)
        return await handler(request)
    except QuireError as error:
        record.error = error.name
        return error_response(error)
    except web.HTTPException as error:
        return _from_aiohttp(error, request, record)
    except Exception:
        log.exception("request failed", extra={"request_id": record.request_id})
        record.error = "internal_error"
        return error_response(internal_error(record))


def _from_aiohttp(
    error: web.HTTPException, request: web.Request, record: RequestRecord
) -> web.StreamResponse:
    """aiohttp's own refusals, in our shape."""
    name = record.error = _BY_STATUS.get(error.status, "invalid_request")
    messages = {
        "not_found": f"There is no {request.path[:128]!r} here.",
        "method_not_allowed": f"{request.method[:16]} is not allowed on {request.path[:128]!r}.",
    }
    response = error_response(QuireError(name, messages.get(name, error.reason or name)))
    response.set_status(error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every response, streams included."""
    record = request.get(RECORD)
    if record is not None:
        response.headers["x-request-id"] = record.request_id
    response.headers["Server"] = "quire"
    if request.app[GATEWAY].draining:
        response.force_close()
        response.headers["Connection"] = "close"


def _finish(gateway: Gateway, record: RequestRecord) -> None:
    metrics = gateway.metrics
    metrics.http_requests.labels(record.route, str(record.status)).inc()
    if record.is_generation:
        metrics.duration.observe(record.duration)
        metrics.llm_requests.inc()
        metrics.llm_duration.observe(record.duration * 1000)
    record.span.set(http__response__status_code=record.status)
    record.span.end(record.error)
    quiet = record.route in _QUIET or record.error == "queue_full"  # Room logs those together
    level = logging.DEBUG if quiet else logging.INFO
    log.log(level, "request", extra=record.log_fields())
