"""What the launchers share. Knows no op."""

from __future__ import annotations

import triton

# For every launch: no silent a * b + c -> fma. Each product and sum is rounded once, so two kernels
# that write the same formula get the same bits, and triton's changing default (fused up to 3.9, not
# after) does not change ours.
ROUNDING = {"enable_fp_fusion": False}


def interpreted() -> bool:
    """True under TRITON_INTERPRET=1, where kernels run as numpy on the CPU (and bf16 arithmetic is
    wrong).
    """
    return bool(triton.knobs.runtime.interpret)


def row_warps(block: int) -> int:
    """Warps for a program that reduces one row of `block` elements; a function of the width alone,
    never of the batch.
    """
    return min(max(block // 512, 1), 16)
