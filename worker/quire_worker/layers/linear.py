"""A linear layer on the model's device.

Knows one weight. On a CPU it is `quire_kernels.cpu.linear` (prepacked, padded as the start-up proof
asks); elsewhere torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Linear = Callable[[torch.Tensor], torch.Tensor]  # [rows, in_features] -> [rows, out_features]


@dataclass(slots=True)
class PlainLinear:
    weight: torch.Tensor  # [out_features, in_features]
    bias: torch.Tensor | None  # [out_features]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, prepack: bool = True
) -> Linear:
    """`prepack=False` keeps the plain weight, for one that is also the embedding table."""
    if weight.device.type != "cpu":
        return PlainLinear(weight, bias)
    from quire_kernels.cpu import linear as cpu_linear

    return cpu_linear.make_linear(weight, bias, prepack=prepack)
