"""EventStream: server-sent events over one HTTP response.

Writes `data:` lines, keep-alive comments and the two endings: [DONE], or an error event and
nothing after it. Cuts off a reader that does not read. Knows no OpenAI shapes.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from quire.errors import QuireError
from quire_gateway.openai.shapes import dumps

WRITE_TIMEOUT = 30.0  # s a single write may be blocked by the reader
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """The response exists after open(); before it an error can still be a status. close() it
    on every way out."""

    def __init__(self, request: web.Request, write_timeout: float = WRITE_TIMEOUT) -> None:
        self._request = request
        self._write_timeout = write_timeout
        self._loop = asyncio.get_running_loop()
        self._blocked_since: float | None = None  # a write that has not returned yet
        self._watchdog: asyncio.TimerHandle | None = None
        self.response = web.StreamResponse(headers=HEADERS)

    @property
    def is_open(self) -> bool:
        return self.response.prepared

    async def open(self) -> None:
        await self.response.prepare(self._request)
        self._watch()

    def close(self) -> None:
        """Let go of the timer."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    async def send(self, *values: str) -> None:
        """One event per JSON text, all in one write. Raises ConnectionResetError when the
        reader is gone; one that has not read for too long is cut off first."""
        await self._write("".join(f"data: {value}\n\n" for value in values))

    async def keep_alive(self) -> None:
        """A comment: keeps proxies and impatient clients from hanging up."""
        await self._write(": keep-alive\n\n")

    async def done(self) -> None:
        """End as a complete stream does."""
        await self._write("data: [DONE]\n\n")
        await self.response.write_eof()

    async def fail(self, error: QuireError) -> None:
        """End with an error event. No [DONE]: clients take that for a complete answer."""
        await self.send(dumps(error.to_openai()))
        await self.response.write_eof()

    async def _write(self, text: str) -> None:
        self._blocked_since = self._loop.time()
        await self.response.write(text.encode())
        self._blocked_since = None

    def _watch(self) -> None:
        """One timer a stream, not one a write: writes hardly ever block."""
        blocked, now = self._blocked_since, self._loop.time()
        if blocked is not None and now - blocked >= self._write_timeout:
            if self._request.transport is not None:
                self._request.transport.abort()  # the write then fails
            return
        self._watchdog = self._loop.call_later(self._write_timeout / 4, self._watch)
