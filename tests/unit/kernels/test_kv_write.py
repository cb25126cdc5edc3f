"""RoPE and cache write: the reference against the textbook formula, Triton (interpreted) against
the reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire_kernels import kv_write
from unit.kernels.kernel_cases import TOLERANCE, rope_case


def test_reference_is_half_rotation() -> None:
    case = rope_case()
    q, pool = case.call(kv_write.rope_kv_write)
    half = 32
    angle = case.positions[:, None] * 10000.0 ** -(torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def expected(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    torch.testing.assert_close(q, expected(case.q), atol=1e-5, rtol=1e-5)
    keys = expected(case.k)
    for i, where in enumerate(case.slot_mapping.tolist()):
        if where >= 0:
            stored = pool[where // 16, 1, :, :, where % 16]
            torch.testing.assert_close(stored[0], keys[i], atol=1e-5, rtol=1e-5)
            assert torch.equal(stored[1], case.v[i])
    assert (
        pool.count_nonzero() == 4 * 2 * 2 * 64
    )  # four of five tokens; nothing else, no other layer


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_dim": 128, "norm": True},
        {"head_dim": 80},
        {"head_dim": 96, "norm": True, "heads": 7, "kv_heads": 1},
        {"rotary_dim": 32},
        {"rotary_dim": 32, "norm": True, "head_dim": 80},
        {"heads": 18, "kv_heads": 9},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "norm": True},
        {"dtype": torch.float16, "norm": True},
    ],
)
def test_triton_equals_reference(options: Any) -> None:
    from quire_kernels.gpu.kv_write import rope_kv_write

    case = rope_case(**options)
    limit = TOLERANCE[case.q.dtype]
    for got, want in zip(case.call(rope_kv_write), case.call(kv_write.rope_kv_write), strict=True):
        torch.testing.assert_close(got, want, atol=limit, rtol=limit)
