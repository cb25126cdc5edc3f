"""Waiting until a server can be used, by its own /ready and /health.

Knows one host, one port and two routes; nothing of processes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

POLL_S = 0.05


async def until_ready(host: str, port: int, say: Callable[..., None]) -> None:
    """Return when GET /ready answers 200; say what /health names as the reason until then."""
    told = ""
    begin = time.monotonic()
    while True:
        status, _ = await get(host, port, "/ready")
        if status == 200:
            return
        if status:
            _, body = await get(host, port, "/health")
            now = _progress(body)
            if now and now != told and time.monotonic() - begin > 1.0:
                told = now
                say(f"Waiting: {now} ({time.monotonic() - begin:.0f} s)")
        await asyncio.sleep(POLL_S)


def _progress(body: bytes) -> str:
    """The reason in a /health body, in words; '' when there is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    problem = found.get("problem")
    return problem[:120] if isinstance(problem, str) else ""


async def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of one small HTTP answer; (0, b'') when there is none in 2 s."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                answer = await reader.read(1 << 16)
                while chunk := await reader.read(1 << 16):
                    answer += chunk
            finally:
                writer.close()
        line, _, body = answer.partition(b"\r\n\r\n")
        return int(line.split(None, 2)[1]), body
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, b""
