"""Team: how many CPU threads a step gets.

A small step of a small model is faster on one thread: waking the others costs more than they
save, and scheduler and gateway want cores too. Bits do not depend on the number of threads.
Knows step sizes, not what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

SIZES = (1, 8, 32, 128)  # tokens of the steps that are tried
GAIN = 1.25  # how much faster a team must be to be worth the cores it takes
LONG_S = 0.02  # a step this long is worth a team anyway


class Team:
    """Up to `most` threads; steps of at most `serial_tokens` tokens run on one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.serial_tokens = 0

    def gather(self, num_tokens: int) -> None:
        """Set the calling thread's number of threads for a step of so many tokens."""
        self._set(1 if num_tokens <= self.serial_tokens else self.most)

    def calibrate(self, step: Callable[[int], float], largest: int) -> None:
        """Find serial_tokens. step(num_tokens) runs one step and returns its seconds."""
        if self.most == 1:
            return
        for size in SIZES:
            if size > largest:
                break
            times: dict[int, list[float]] = {1: [], self.most: []}
            self._set(self.most)
            if step(size) > LONG_S:
                break
            for _ in range(4):  # in turn, so that other load hits both; the first warms up
                for threads, seconds in times.items():
                    self._set(threads)
                    seconds.append(step(size))
            alone, together = min(times[1][1:]), min(times[self.most][1:])
            if alone > LONG_S or alone > GAIN * together:
                break
            self.serial_tokens = size
        self._set(self.most)

    def _set(self, threads: int) -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
