"""TextStream: the text of one output sequence, from its tokens to what a client may see.

Joins detokenizer and stop strings and counts tokens. Knows no engine and no protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.sampling import SamplingParams
from quire_gateway.text.detokenizer import detokenizer
from quire_gateway.text.stop import StopMatcher
from quire_gateway.text.tokenizer import Tokenizer


class TextStream:
    """Push tokens as they come, read text. After a stop string nothing more comes out, and
    `num_tokens` counts up to the token that completed it.

    As in vLLM, stop strings are not looked for in the first `min_tokens` tokens, and a token
    that ended the sequence (EOS or a stop token id) is not shown unless
    `include_stop_str_in_output`.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self.num_tokens = 0
        self._detokenizer = detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._show_stop_token = params.include_stop_str_in_output

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, or None."""
        return self._matcher.matched

    def push(self, token_ids: Sequence[int], last: bool = False, stopped: bool = False) -> str:
        """The text these tokens add. last: no more tokens come, so everything held back comes
        out; stopped: the last one is an EOS or stop token."""
        parts: list[str] = []
        for k, token_id in enumerate(token_ids):
            if self.stop_string is not None:
                return "".join(parts)
            self.num_tokens += 1
            if stopped and k == len(token_ids) - 1 and not self._show_stop_token:
                break
            piece = self._detokenizer.push(token_id)
            if piece:
                parts.append(self._match(piece))
        if last and self.stop_string is None:
            parts.append(self._match(self._detokenizer.flush()))
            parts.append(self._matcher.flush())
        return "".join(parts)

    def _match(self, piece: str) -> str:
        return piece if self.num_tokens <= self._min_tokens else self._matcher.push(piece)
