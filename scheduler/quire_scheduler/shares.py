"""Who gets how much of a step's token budget: pure functions.

Knows no state, no blocks and no wire: counts in, counts out. All work per row is numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.step_cost import StepSize
from quire_scheduler.columns import I32

SHARERS = 4  # prompts that share the budget; more at once would only delay the first ones


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold."""

    max_num_batched_tokens: int
    max_num_seqs: int
    enable_chunked_prefill: bool = True
    # (the step's decoding rows, where the longest prompt goes on) -> tokens that prompts may have
    # beside them; None = what the budget leaves
    prompt_tokens: Callable[[StepSize, int], int] | None = None
    copy_s: float = 0.010  # that copies between the tiers may take beside rows that decode


def hand_out(
    wanted: I32,
    last_seq: NDArray[np.int64],
    rivals: Sequence[int],
    budget: int,
    for_prompts: int | None = None,
) -> tuple[I32, list[int]]:
    """Tokens for each running row [num_running] and for each of the next newcomers [num_rivals].

    A row that wants one token gets it (the least recently served first where the budget is too
    small for all); what is left, at most `for_prompts`, is shared fairly among prompts, running
    ones first. A quarter stays for running prompts, so that decoding rows can't starve them.
    """
    nums = np.zeros_like(wanted)
    single = np.flatnonzero(wanted == 1)
    prompts = np.flatnonzero(wanted > 1)
    room = budget - (budget // 4 if len(prompts) else 0)
    if len(single) > room:
        single = single[np.argsort(last_seq[single], kind="stable")[:room]]
    nums[single] = 1
    if not len(prompts) and not rivals:
        return nums, []
    left = budget - len(single)
    left = left if for_prompts is None else min(left, for_prompts)
    sharing = prompts[: min(SHARERS, left)]
    num_rivals = min(len(rivals), min(SHARERS, left) - len(sharing))
    shares = water_fill([*wanted[sharing].tolist(), *rivals[:num_rivals]], left)
    nums[sharing] = shares[: len(sharing)]
    return nums, shares[len(sharing) :] + [0] * (len(rivals) - num_rivals)


def water_fill(wants: Sequence[int], budget: int) -> list[int]:
    """Shares of the budget: nobody gets more than wanted, nor less than another (but for a
    remainder of one) except because it wants less."""
    shares = [0] * len(wants)
    order = sorted(range(len(wants)), key=lambda i: (wants[i], -i))
    for position, i in enumerate(order):
        shares[i] = min(wants[i], budget // (len(order) - position))
        budget -= shares[i]
    return shares


def blocks_for(num_tokens: I32, block_size: int) -> I32:
    """Blocks that hold so many tokens."""
    blocks: I32 = -(-num_tokens // block_size)
    return blocks
