"""StopMatcher: finds stop strings in text that arrives in pieces.

Holds back only what could still become a stop string. The answer does not depend on how
the text is cut into pieces. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """One automaton (Knuth-Morris-Pratt) per stop string: linear in the text, whatever it is.

    The stop string that is complete first wins; of two that end together, the longer one.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._stop = sorted(stop, key=len, reverse=True)
        self._fallbacks = [_fallbacks(s) for s in self._stop]
        self._states = [0] * len(self._stop)  # characters of each stop string matched so far
        self._held = ""
        self._include = include_stop_str_in_output

    def push(self, piece: str) -> str:
        """The text that is safe to show after this piece. Sets `matched` when a stop string
        is complete; the text then ends before it (or after it, when it is included)."""
        if not self._stop or self.matched is not None:
            return "" if self.matched is not None else piece
        text = self._held + piece
        for place in range(len(self._held), len(text)):
            matched = self._advance(text[place])
            if matched is not None:
                self.matched = matched
                self._held = ""
                end = place + 1
                return text[: end if self._include else end - len(matched)]
        safe = len(text) - max(self._states)
        self._held = text[safe:]
        return text[:safe]

    def _advance(self, char: str) -> str | None:
        """Move every automaton by one character; the stop string that is complete, if any."""
        found = None
        for k, stop in enumerate(self._stop):
            state, back = self._states[k], self._fallbacks[k]
            while state and stop[state] != char:
                state = back[state - 1]
            if stop[state] == char:
                state += 1
                if state == len(stop):
                    found = found or stop  # longest first
                    state = back[state - 1]
            self._states[k] = state
        return found

    def flush(self) -> str:
        """The text held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _fallbacks(word: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(word)
    for i in range(1, len(word)):
        k = table[i - 1]
        while k and word[i] != word[k]:
            k = table[k - 1]
        table[i] = k + 1 if word[i] == word[k] else 0
    return table
