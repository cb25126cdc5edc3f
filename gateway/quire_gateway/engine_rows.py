"""Rows: the columns of one AttachResponse, read row by row.

Checks that the columns fit together; knows no requests.
"""

from __future__ import annotations

from quire.v1 import engine_pb2
from quire.wire import unpack_i32, unpack_u32
from quire_gateway.logprobs import TokenLogprobs, read_logprobs


class Rows:
    """The columns of one AttachResponse. Raises ValueError when their lengths disagree."""

    def __init__(self, message: engine_pb2.AttachResponse) -> None:
        self.handles = unpack_u32(message.handles)
        self.attempts = unpack_u32(message.attempts)
        self.first_indices = unpack_u32(message.first_indices)
        self.num_tokens = unpack_u32(message.num_tokens)
        self.finish_reasons = message.finish_reasons
        self.stop_token_ids = unpack_i32(message.stop_token_ids)
        self.num_cached_tokens = unpack_u32(message.num_cached_tokens)
        self.deaths = unpack_u32(message.deaths)
        self._token_ids = unpack_i32(message.token_ids)
        self._place = 0
        lengths = {
            len(column)
            for column in (
                self.handles, self.attempts, self.first_indices, self.num_tokens,
                self.finish_reasons, self.stop_token_ids, self.num_cached_tokens, self.deaths,
            )
        }  # fmt: skip
        if len(lengths) != 1 or sum(self.num_tokens) != len(self._token_ids):
            raise ValueError("the scheduler sent columns that do not fit together")
        self._logprobs: list[TokenLogprobs | None] = []
        if message.HasField("logprobs"):
            self._logprobs = read_logprobs(message.logprobs, len(self._token_ids))

    def tokens(self, row: int) -> tuple[list[int], list[TokenLogprobs]]:
        """Tokens of the row and, when it asked for them, their log-probabilities. Call once
        per row, in order."""
        begin, self._place = self._place, self._place + self.num_tokens[row]
        logprobs = [p for p in self._logprobs[begin : self._place] if p is not None]
        return self._token_ids[begin : self._place].tolist(), logprobs
