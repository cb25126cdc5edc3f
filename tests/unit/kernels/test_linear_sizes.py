"""Linear layers see few row counts, whatever a step holds, and padding changes no bits."""

from __future__ import annotations

import torch

from quire_kernels.cpu.linear import few_sizes, make_linear


def test_all_steps_have_few_sizes():
    padded = {rows + -rows % few_sizes(rows) for rows in range(1, 8193)}
    assert len(padded) < 160 and all(-rows % few_sizes(rows) < 64 for rows in range(1, 8193))
    waste = max((-rows % few_sizes(rows)) / rows for rows in range(65, 8193))
    assert waste < 0.25


def test_padded_rows_have_the_bits_of_any_other_number_of_rows():
    generator = torch.Generator().manual_seed(3)
    linear = make_linear(torch.randn(96, 64, generator=generator).bfloat16())
    x = torch.randn(320, 64, generator=generator).bfloat16()
    whole = linear(x)
    for rows in (17, 33, 100, 255, 257, 300):
        assert torch.equal(linear(x[:rows]), whole[:rows])
