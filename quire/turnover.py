"""Turnover: how fast places become free, and when a refused client may hope for one.

Knows only the moments at which places are all taken, freed and refused; not whose they are.
"""

from __future__ import annotations

MIN_WAIT_S, MAX_WAIT_S = 0.05, 60.0
MEMORY = 512  # finishes; older ones count half, then a quarter


class Turnover:
    """Measures while busy only: an idle server's rate is that of its arrivals, not what it can do.

    Each refusal is told a moment of its own, one interval after the last one told: clients that
    come back as told find one place each. Times are seconds of one clock, whichever.
    """

    def __init__(self, first_guess_s: float = 0.25) -> None:
        self.first_guess_s = first_guess_s  # between two places, before anything is measured
        self._busy_s = 0.0
        self._freed = 0.0  # places, while busy
        self._busy_since: float | None = None
        self._promised = 0.0  # places that refused clients were told of, as of _promised_at
        self._promised_at = 0.0

    def busy(self, now: float) -> None:
        """From now on the rate is the server's own. Said again, it changes nothing."""
        if self._busy_since is None:
            self._busy_since = now

    def rest(self, now: float) -> None:
        """No longer busy. Said again, it changes nothing."""
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def freed(self, now: float) -> None:
        """A place became free."""
        if self._busy_since is None:
            return
        self._freed += 1
        if self._freed > MEMORY:
            self._freed /= 2
            self._busy_s = (self._busy_s + now - self._busy_since) / 2
            self._busy_since = now

    def interval(self, now: float) -> float:
        """Seconds between two places. With none freed yet: as long as it has been busy."""
        since = now if self._busy_since is None else self._busy_since
        return max((self.first_guess_s + self._busy_s + now - since) / (1 + self._freed), 1e-6)

    def retry_after(self, now: float, places: int = 1) -> float:
        """Seconds after which the client that is being refused should come back for so many."""
        interval = self.interval(now)
        self._promise(now, self._outstanding(now, interval) + places, interval)
        return min(max(self._promised * interval, MIN_WAIT_S), MAX_WAIT_S)

    def told(self, now: float, wait_s: float) -> None:
        """Another, who may know more, told a client to come back then: others come later."""
        interval = self.interval(now)
        self._promise(now, max(self._outstanding(now, interval), wait_s / interval), interval)

    def _outstanding(self, now: float, interval: float) -> float:
        """Promised places that are still to come; one lapses each interval."""
        return max(self._promised - (now - self._promised_at) / interval, 0.0)

    def _promise(self, now: float, places: float, interval: float) -> None:
        self._promised = min(places, max(MAX_WAIT_S / interval, 1.0))
        self._promised_at = now
