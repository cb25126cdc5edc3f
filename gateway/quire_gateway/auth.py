"""API keys: deny by default, compare in constant time.

Knows which routes are open, nothing of what the others do.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from quire.errors import QuireError

OPEN_ROUTES = frozenset({"/health", "/ready", "/ping", "/metrics"})


class KeyRing:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, path: str, headers: Mapping[str, str]) -> str:
        """The tenant the request belongs to: "" unless there are several keys, which must not
        share a cache. Raises 'invalid_api_key'."""
        if not self._digests or path in OPEN_ROUTES:
            return ""
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(sent)
        # every key is compared, so that time tells nothing about which one was near
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not sent or not any(matches):
            what = "Incorrect API key." if sent else "No API key."
            raise QuireError("invalid_api_key", f"{what} Send it as 'Authorization: Bearer KEY'.")
        return digest.hex()[:16] if len(self._digests) > 1 else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
