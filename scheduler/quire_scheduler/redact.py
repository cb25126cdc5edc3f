"""What --journal-privacy keeps out of the journal: tokens, and all that tells them.

Knows frames; not files. `hashed` puts keyed hashes of the same length in their place, `none`
nothing. The key is random, one per segment, and never stored, so that inside a segment equal
prompts and prefixes look equal and no dictionary helps. Log-probabilities, vectors, biases,
grammars and the wording of errors can betray tokens too: they go in both.
"""

from __future__ import annotations

import hashlib
import secrets
import struct

import numpy as np

from quire.v1 import step_pb2
from quire.wire import NAME_BYTES
from quire_scheduler.segment import Direction

GROUP_BYTES = 64  # 16 tokens: what one BLAKE2b digest covers


class Redactor:
    """One segment's rule. `full` changes nothing."""

    def __init__(self, privacy: str) -> None:
        self._full = privacy == "full"
        self._none = privacy == "none"
        self._key = secrets.token_bytes(32)

    def __call__(self, direction: Direction, frame: bytes) -> bytes:
        """The frame as it may be written."""
        if self._full:
            return frame
        if direction is Direction.PLAN:
            plan = step_pb2.SchedulerFrame.FromString(frame)
            self._plan(plan.plan)
            return plan.SerializeToString()
        message = step_pb2.WorkerFrame.FromString(frame)
        if message.HasField("result"):
            self._result(message.result)
        elif message.HasField("hello"):
            message.hello.held_block_names = self._names(message.hello.held_block_names)
            message.hello.held_host_block_names = self._names(message.hello.held_host_block_names)
        elif message.HasField("ack"):
            message.ack.error = _first_word(message.ack.error)
        return message.SerializeToString()

    def _plan(self, plan: step_pb2.StepPlan) -> None:
        plan.block_names = self._names(plan.block_names)
        for op in plan.kv_ops:
            op.block_names = self._names(op.block_names)
        for admit in plan.admit:
            prompt = admit.prompt_token_ids
            whole = self._tokens(prompt + admit.output_token_ids, b"")
            admit.prompt_token_ids = whole[: len(prompt)]
            admit.output_token_ids = whole[len(prompt) :]
            for name in ("grammar", "multimodal"):
                admit.ClearField(name)
            for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
                admit.sampling_params.ClearField(name)

    def _result(self, result: step_pb2.StepResult) -> None:
        """A result's tokens hash with their step: equal tokens do not show, or counting them
        would tell which they are."""
        result.token_ids = self._tokens(
            result.token_ids, struct.pack("<QQ", result.epoch, result.seq)
        )
        result.ClearField("logprobs")
        result.ClearField("pooled")
        result.error = _first_word(result.error)
        for row in result.row_errors:
            row.error.message = ""

    def _tokens(self, column: bytes, tweak: bytes) -> bytes:
        """A column of i32 as another of the same length: a chain over groups of 16 tokens, each
        hashed with all that stands before it."""
        if self._none:
            return b""
        groups: list[bytes] = []
        last = tweak
        for start in range(0, len(column), GROUP_BYTES):
            group = column[start : start + GROUP_BYTES]
            last = hashlib.blake2b(last + group, digest_size=GROUP_BYTES, key=self._key).digest()
            groups.append(last[: len(group)])
        hashed = np.frombuffer(b"".join(groups), "<i4") & 0x7FFFFFFF
        return hashed.astype("<i4", copy=False).tobytes()

    def _names(self, names: bytes) -> bytes:
        if self._none:
            return b""
        return b"".join(
            hashlib.blake2b(
                names[start : start + NAME_BYTES], digest_size=NAME_BYTES, key=self._key
            ).digest()
            for start in range(0, len(names), NAME_BYTES)
        )


def _first_word(error: str) -> str:
    """'RuntimeError' of 'RuntimeError: token 17 is ...'."""
    return error.partition(":")[0]
