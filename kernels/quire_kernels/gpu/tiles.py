"""How an attention launch cuts its work: plain numbers, decided from shapes on the host.

Knows no kernel and imports no triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_SEGMENT = 512  # keys; part of the definition of the bits, not a tuning knob of a launch
_MAX_WORKSPACE_BYTES = 512 << 20


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """How a launch cuts its work."""

    block_m: int  # rows of a Q block
    block_n: int  # keys of a tile
    segment: int  # keys of a segment, a multiple of block_n; 0 = one running state, never split
    split: bool
    num_warps: int
    num_stages: int


def choose_tiles(
    num_tokens: int,
    num_reqs: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    *,
    max_seq_len: int,
    multiprocessors: int,
    capability: int,
    fixed_tiles: bool = False,
) -> Tiles:
    """Pure: the tiles for `num_tokens` query tokens in `num_reqs` requests, `group` query heads per
    KV head.

    `capability` is the compute capability times ten (90 = Hopper). Register counts behind the
    choices: `aot.py`.
    """
    d_pad = next_power_of_2(head_dim)
    row_bytes = d_pad * itemsize
    block_n = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    smallest = max(16, next_power_of_2(group))
    mean_rows = next_power_of_2(group * num_tokens // max(num_reqs, 1))
    widest = 32 if itemsize == 4 else 64 if d_pad > 128 else 128
    block_m = max(smallest, 32 if fixed_tiles else min(mean_rows, widest))
    num_warps = 8 if block_m * d_pad > 64 * 128 else 4
    if block_m >= 64 and not fixed_tiles:
        if capability < 90 and d_pad > 64:
            block_n = 32  # without wgmma both operands sit in registers
        return Tiles(block_m, block_n, 0, split=False, num_warps=num_warps, num_stages=3)
    q_blocks = num_tokens // (block_m // group) + num_reqs
    segments = -(-max_seq_len // _SEGMENT)
    workspace = 4 * num_tokens * num_kv_heads * group * segments * d_pad
    idle = q_blocks * num_kv_heads < 2 * multiprocessors
    split = segments > 1 and idle and workspace <= _MAX_WORKSPACE_BYTES
    return Tiles(block_m, block_n, _SEGMENT, split, num_warps, num_stages=3)


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and compute capability; of no matter in the interpreter."""
    if device.type != "cuda":
        return 1, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
