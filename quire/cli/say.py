"""What `quire serve` tells its user: lines on stdout, as text or as JSON.

Knows no service; log lines of the services go to stderr by quire.log.
"""

from __future__ import annotations

import logging
import sys

from quire.log import JsonFormatter


class Say:
    """Prints one line per event, in the format that the logs have."""

    def __init__(self, format: str = "text") -> None:
        self._json = JsonFormatter("serve") if format == "json" else None

    def __call__(self, message: str, **fields: object) -> None:
        """Print the message; in JSON with the fields beside it."""
        if self._json is not None:
            record = logging.makeLogRecord({"msg": message, "levelname": "INFO", **fields})
            message = self._json.format(record)
        try:
            print(message, flush=True)
        except BrokenPipeError:  # nobody reads us any more; the server goes on
            sys.stdout = open("/dev/null", "w")
