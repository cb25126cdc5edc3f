"""A linear layer on a CPU: prepacked oneDNN where torch has it, rows padded to the count the
start-up proof asks for.

Knows one weight. `torch.ops.mkldnn` is private to torch, so its use is guarded and plain `F.linear`
takes over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class CpuLinear:
    """y = x w^T + bias. `row_multiple` and `row_block` are set by `invariance.prove_linear` before
    the first real step.
    """

    weight: torch.Tensor  # [out_features, in_features], or oneDNN's packed form of it
    bias: torch.Tensor | None  # [out_features]
    in_features: int
    out_features: int
    packed: bool
    row_multiple: int = 1  # rows are padded to a multiple of this
    row_block: int = 0  # > 0: the last resort, exactly this many rows at a time on one thread

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features], x's dtype."""
        rows = x.shape[0]
        extra = -rows % (self.row_block or max(self.row_multiple, few_sizes(rows)))
        if extra:
            x = F.pad(x, (0, 0, 0, extra))
        if self.row_block:
            with threads(1):
                y = torch.cat([self.raw(part) for part in x.split(self.row_block)])
        else:
            y = self.raw(x)
        return y[:rows] if extra else y

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """The product without padding; its bits may depend on the number of rows."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.default(
                x, self.weight, self.bias, "none", [], ""
            )
        return F.linear(x, self.weight, self.bias)


def few_sizes(rows: int) -> int:
    """What to pad so many rows to a multiple of. oneDNN compiles a kernel for each number of rows
    and keeps half a MiB of it, for up to 1,024 kernels."""
    if rows <= 16:
        return 1
    return 16 if rows <= 256 else 64


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU operations on `count` threads inside."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, prepack: bool = True
) -> CpuLinear:
    """weight [out_features, in_features]. Prepacking copies; the caller drops the plain weight to
    free it.
    """
    out_features, in_features = weight.shape
    packed = _pack(weight) if prepack else None
    kept = weight if packed is None else packed
    return CpuLinear(kept, bias, in_features, out_features, packed is not None)


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """oneDNN's layout of the weight, or None where this torch, dtype or CPU has no such path."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")):
        return None
    try:
        packed = ops._reorder_linear_weight(weight, None)
        probe = torch.zeros(2, weight.shape[1], dtype=weight.dtype)
        ops._linear_pointwise.default(probe, packed, None, "none", [], "")
    except RuntimeError:  # e.g. fp16 without avx512_fp16, bf16 without AVX-512
        return None
    return packed
