"""The start-up proof: on this machine, with these shapes, do a row's bits depend on what else is
computed?

Knows shapes, dtypes and thread counts; nothing of models. It compares rows bitwise over row counts
and over one thread and all of them, in milliseconds, and answers with the padding and tile sizes
under which nothing differs. What it found has a name, which becomes part of `system_fingerprint`:
another machine may add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from quire_kernels.cpu.act import silu_mul
from quire_kernels.cpu.linear import CpuLinear, threads
from quire_kernels.cpu.norm import rms_norm
from quire_kernels.cpu.plan import Tiling, large_query_tokens, tile_tokens_for

_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64)
_ROWS_WIDE = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    12,
    16,
    32,
)  # for the vocabulary: each row costs 30 times more
_WIDE = 64 << 20  # weight elements from which the short list is used
_MULTIPLES = (1, 2, 4, 8, 16, 32)
_ROW_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was proven. `name` says what bits depend on, e.g. `cpu-avx512-bfloat16-onednn-kv64`, and
    ends in `-unproven` where rows may differ; padding is in `detail`, since it changes no bits."""

    tiling: Tiling
    name: str
    detail: str  # for the log, e.g. "rows padded to 2, attention items of 4 and 64 rows"


def prove(
    linears: Iterable[CpuLinear],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
) -> Outcome:
    """Set each linear's padding and choose the attention tiling."""
    seen: dict[tuple[int, int, bool, bool], tuple[int, int]] = {}
    packed = True
    with torch.inference_mode():
        for linear in linears:
            key = (linear.in_features, linear.out_features, linear.packed, linear.bias is None)
            if key not in seen:
                seen[key] = prove_linear(linear, dtype)
            linear.row_multiple, linear.row_block = seen[key]
            packed &= linear.packed
        tiling, proven = prove_attention(
            num_heads, num_kv_heads, head_dim, tile_tokens_for(block_size)
        )
        proven &= prove_rowwise((hidden_size, head_dim), intermediate_size, dtype)
    blocked = any(block for _, block in seen.values())
    rows = max((multiple for multiple, _ in seen.values()), default=1)
    padding = f"{_ROW_BLOCK} rows at a time" if blocked else f"rows padded to {rows}"
    isa = torch.backends.cpu.get_cpu_capability().lower().replace("_", "")
    library = "onednn" if packed else "torch"
    parts = [
        "cpu",
        isa,
        str(dtype).removeprefix("torch."),
        library,
        f"kv{tile_tokens_for(block_size)}",
    ]
    return Outcome(
        tiling,
        "-".join(parts if proven else [*parts, "unproven"]),
        f"{padding}, attention items of {tiling.row_multiple} and {tiling.large_rows} rows",
    )


def prove_linear(linear: CpuLinear, dtype: torch.dtype) -> tuple[int, int]:
    """(row_multiple, row_block): the least padding under which all row counts agree; row_block > 0
    when none does.
    """
    wide = linear.in_features * linear.out_features > _WIDE
    counts = _ROWS_WIDE if wide else _ROWS
    top = counts[-1] if wide else 128
    x = _noise(top, linear.in_features).to(dtype)
    with threads(1):
        reference = linear.raw(x)
    differing = set()
    for count in _thread_counts():
        with threads(count):
            for rows in (*counts, top):
                at = (top - rows) // 2
                if not torch.equal(linear.raw(x[at : at + rows]), reference[at : at + rows]):
                    differing.add(rows)
    for multiple in _MULTIPLES:
        if not any(rows % multiple == 0 for rows in differing):
            return multiple, 0
    return 1, _ROW_BLOCK


def prove_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, tile_tokens: int
) -> tuple[Tiling, bool]:
    """(tiling, proven): item sizes whose query rows agree bitwise in any number of items."""
    group = num_heads // num_kv_heads
    for tiling in (
        Tiling(4, 64),
        Tiling(8, 64),
        Tiling(16, 64),
        Tiling(4, 0),
        Tiling(8, 0),
        Tiling(16, 0),
    ):
        large = large_query_tokens(group, tiling)
        sizes = {
            -(-n * group // tiling.row_multiple) * tiling.row_multiple for n in (1, large) if n
        }
        if _products_agree(sorted(sizes), num_kv_heads, head_dim, tile_tokens):
            return tiling, True
    return Tiling(16, 0), False


def prove_rowwise(norm_sizes: Iterable[int], intermediate_size: int, dtype: torch.dtype) -> bool:
    """Do norms and the activation agree over row counts and threads?"""
    agree = True
    for size in norm_sizes:
        x, weight = _noise(64, size).to(dtype), _noise(1, size)[0].to(dtype)
        agree &= _rows_agree(partial(rms_norm, weight=weight, eps=1e-6), x)
    return agree and _rows_agree(silu_mul, _noise(64, 2 * intermediate_size).to(dtype))


def _rows_agree(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    with threads(1):
        reference = function(x)
    for count in _thread_counts():
        with threads(count):
            for rows in (1, 2, 3, 5, 8, 17, 64):
                if not torch.equal(function(x[-rows:]), reference[-rows:]):
                    return False
    return True


def _products_agree(sizes: list[int], num_kv_heads: int, head_dim: int, tile_tokens: int) -> bool:
    items, rows = num_kv_heads * 8, sizes[-1]
    queries = _noise(items * rows, head_dim).view(items, rows, head_dim)
    keys = _noise(items * tile_tokens, head_dim).view(items, tile_tokens, head_dim)
    values = (
        _noise(items * tile_tokens, head_dim).view(items, tile_tokens, head_dim).roll(1, dims=2)
    )
    weights = _noise(items * rows, tile_tokens).view(items, rows, tile_tokens).abs()
    with threads(1):
        scores, outputs = torch.bmm(queries, keys.transpose(1, 2)), torch.bmm(weights, values)
    for count in _thread_counts():
        with threads(count):
            for size in sizes:
                for pairs in (1, 2, 3, 8):
                    n = pairs * num_kv_heads
                    for span in (slice(0, size), slice(rows - size, rows)):
                        s = torch.bmm(queries[:n, span].contiguous(), keys[:n].transpose(1, 2))
                        o = torch.bmm(weights[:n, span].contiguous(), values[:n])
                        if not (
                            torch.equal(s, scores[:n, span]) and torch.equal(o, outputs[:n, span])
                        ):
                            return False
    return True


def _noise(rows: int, columns: int) -> torch.Tensor:
    """Values of many magnitudes, the same at every start, without touching torch's generator."""
    generator = torch.Generator().manual_seed(20240607)
    return torch.randn(rows, columns, generator=generator)


def _thread_counts() -> list[int]:
    return sorted({1, torch.get_num_threads()})
