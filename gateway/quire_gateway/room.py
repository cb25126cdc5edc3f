"""Room: what the gateway knows of free places at the scheduler, to refuse before doing the work.

Under overload most requests are refused, and reading, tokenising and submitting each of them
would take the cores that those in their places need. Knows counts and times; no requests.
"""

from __future__ import annotations

import logging

from quire.errors import QuireError
from quire.turnover import Turnover

log = logging.getLogger(__name__)

VALID_S = 0.2  # how long a refusal speaks for the requests after it
LOG_EVERY_S = 10.0


class Room:
    """Nothing is known until the scheduler refuses a request; then there is no place but those
    that requests of this gateway leave. Places that others leave are found by asking again, at
    the latest VALID_S after the last refusal. `now` is seconds of one clock."""

    def __init__(self) -> None:
        self._places: int | None = None  # free ones; None = not known
        self._known_until = 0.0
        self._turnover: Turnover | None = None
        self._num_refused = 0  # since the last line in the log
        self._logged_at = float("-inf")

    def check(self, now: float) -> None:
        """Raise queue_full when the scheduler would."""
        if self._known(now) and self._places is not None and self._places <= 0:
            assert self._turnover is not None
            self._note(now)
            raise QuireError(
                "queue_full",
                "As many requests are running or waiting as the server takes. Try again later.",
                retry_after_s=self._turnover.retry_after(now),
            )

    def taken(self) -> None:
        """A request was submitted."""
        if self._places is not None:
            self._places -= 1

    def freed(self, now: float) -> None:
        """A request that had a place has ended."""
        if self._known(now) and self._places is not None and self._turnover is not None:
            self._places += 1
            self._turnover.freed(now)

    def refused(self, now: float, retry_after_s: float) -> None:
        """The scheduler had no place for a request, and told it when to come back."""
        if self._turnover is None:
            self._turnover = Turnover(min(retry_after_s, 1.0))
        self._known(now)
        self._turnover.busy(now)
        self._turnover.told(now, retry_after_s)
        self._places = 0
        self._known_until = now + VALID_S
        self._note(now)

    def forget(self) -> None:
        """The scheduler went away: its places are others now."""
        self._places = None
        if self._turnover is not None:
            self._turnover.rest(self._known_until)

    def _known(self, now: float) -> bool:
        if self._places is not None and now > self._known_until:
            self.forget()
        return self._places is not None

    def _note(self, now: float) -> None:
        """One line for many refusals."""
        self._num_refused += 1
        if now - self._logged_at >= LOG_EVERY_S:
            log.warning("the queue is full", extra={"refused": self._num_refused})
            self._logged_at, self._num_refused = now, 0
