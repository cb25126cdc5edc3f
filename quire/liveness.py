"""Pulse: how a supervised process shows that its loops turn.

A byte a beat, into a pipe whose other end the supervisor holds. Who beats decides what is
proved: call `beat` from the loop itself, never from a thread that would outlive its standstill.
Without a supervisor a beat does nothing.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

VARIABLE = "QUIRE_PULSE_FD"
INTERVAL_S = 0.25  # between two beats, at least; the longest pause of a loop that beats


class Pulse:
    """Used by one thread."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._last = 0.0  # monotonic

    def beat(self) -> None:
        """As often as one likes; never waits, never raises."""
        now = time.monotonic()
        if self._descriptor is None or now - self._last < INTERVAL_S:
            return
        self._last = now
        with suppress(OSError):  # nobody reads, or nobody is there
            os.write(self._descriptor, b".")


def pulse() -> Pulse:
    """The pulse that the supervisor gave this process. Once only: the variable is removed and
    the descriptor kept from grandchildren."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return Pulse(None)
    descriptor = int(text)
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    return Pulse(descriptor)
