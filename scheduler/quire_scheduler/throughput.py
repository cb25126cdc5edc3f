"""Throughput: tokens per second of the last ten seconds, and the line an operator looks for.

Reads the engine's counters once a second; knows nothing of steps or requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from quire_scheduler.engine import Engine

log = logging.getLogger("quire.scheduler")

TICK_S = 1.0
WINDOW = 10  # ticks


class Throughput:
    """`prompt` and `output` are tokens per second over the window. Ticked by one task."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: deque[tuple[float, int, int]] = deque(maxlen=WINDOW + 1)
        self._until_line = WINDOW
        self.prompt = self.output = 0.0

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            self.tick(time.monotonic())
            await asyncio.sleep(TICK_S)

    def tick(self, now: float) -> None:
        """Take the counters of this moment; logs a line every WINDOW ticks while tokens come."""
        counters = self._engine.counters
        self._seen.append((now, counters.prompt_tokens, counters.output_tokens))
        begin, prompt, output = self._seen[0]
        seconds = max(now - begin, TICK_S)
        self.prompt = (counters.prompt_tokens - prompt) / seconds
        self.output = (counters.output_tokens - output) / seconds
        self._until_line -= 1
        if self._until_line <= 0:
            self._until_line = WINDOW
            if self.prompt or self.output:
                self._log()

    def _log(self) -> None:
        now = self._engine.stats()
        log.info(
            "prompt %.1f tokens/s, output %.1f tokens/s, running %d, waiting %d, "
            "KV usage %.1f %%, prefix hits %.1f %%",
            self.prompt,
            self.output,
            now.num_running,
            now.num_waiting,
            100 * now.num_blocks_used / max(now.num_blocks_total, 1),
            100 * now.prefix_hit_tokens / max(now.prefix_query_tokens, 1),
        )
