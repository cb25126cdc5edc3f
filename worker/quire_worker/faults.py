"""Faults on purpose: what a request does to the step that computes it, for tests of recovery.

Inert unless QUIRE_TEST_FAULT is set (docs/recovery.md). Knows token ids and slots, nothing of
plans. A request is meant by a sequence of token ids that its prompt holds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from quire.errors import ConfigError
from quire_worker.slots import SlotTable

VARIABLE = "QUIRE_TEST_FAULT"
KINDS = ("kill", "fail", "slow")
MAX_SLOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """kill: the process dies. fail: the step raises. slow: a step of its prompt takes
    `seconds` longer."""

    kind: str
    seconds: float
    tokens: bytes  # little-endian int32

    def __call__(self, table: SlotTable, slots: np.ndarray) -> None:
        """Before the step that computes these slots."""
        for slot in slots.tolist():
            prompt = table.token_ids[slot, : table.prompt_len[slot]].astype("<i4").tobytes()
            if not _holds(prompt, self.tokens):
                continue
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind == "fail":
                raise RuntimeError(f"{VARIABLE} asks for it")
            elif table.num_computed_tokens[slot] < table.prompt_len[slot]:
                time.sleep(self.seconds)


def from_environ(environ: Mapping[str, str]) -> Callable[[SlotTable, np.ndarray], None] | None:
    """The faults of `KIND:ID,ID,...;KIND:...` (slow=SECONDS as a kind) as one; None when there are
    none. Raises ConfigError."""
    faults = [_read(text) for text in environ.get(VARIABLE, "").split(";") if text]

    def all_of_them(table: SlotTable, slots: np.ndarray) -> None:
        for fault in faults:
            fault(table, slots)

    return all_of_them if faults else None


def _read(text: str) -> Fault:
    head, _, ids = text.partition(":")
    kind, _, seconds = head.partition("=")
    try:
        tokens = np.array([int(i) for i in ids.split(",")], "<i4").tobytes()
        fault = Fault(kind, float(seconds or 0), tokens)
    except (ValueError, OverflowError):
        fault = Fault("", 0.0, b"")
    if fault.kind not in KINDS or not 0 <= fault.seconds <= MAX_SLOW_S:
        raise ConfigError(f"{VARIABLE} {text[:100]!r} is none of kill:IDS, fail:IDS, slow=S:IDS.")
    return fault


def _holds(data: bytes, part: bytes) -> bool:
    at = data.find(part)
    while at % 4 and at >= 0:
        at = data.find(part, at + 1)
    return at >= 0
