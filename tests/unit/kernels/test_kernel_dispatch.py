"""Dispatch: the table is lazy and complete, and the CPU never meets triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from quire_kernels import dispatch
from unit.kernels.kernel_cases import paged_batch, rope_case


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_reference_and_a_triton_backend(op: str) -> None:
    assert callable(dispatch.resolve(op, "reference"))
    assert {"triton", "cpu", "reference"} <= dispatch.OPS[op].keys()


def test_device_decides() -> None:
    assert dispatch.backend_for(torch.device("cuda", 1)) == "triton"
    assert dispatch.backend_for(torch.device("cpu")) == "cpu"


def test_unknown_names_are_told_apart() -> None:
    with pytest.raises(KeyError, match="unknown op 'nope'; known: paged_attention"):
        dispatch.resolve("nope", "cpu")
    with pytest.raises(KeyError, match="no backend 'tpu'; it has: triton, cpu, reference"):
        dispatch.resolve("sample", "tpu")


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    script = (
        "import sys, quire_kernels, quire_kernels.dispatch\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
        "for op in quire_kernels.dispatch.OPS: quire_kernels.dispatch.resolve(op, 'reference')\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sample_through_dispatch() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    processed = dispatch.process_logits(logits, torch.zeros(1))
    drawn = dispatch.sample(
        processed,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1),
    )
    assert drawn.tolist() == [1]


@pytest.mark.parametrize("window", [0, 6])
def test_attention_through_dispatch_equals_reference(window: int) -> None:
    batch = paged_batch([9, 1], [21, 40], unused=1e4)  # a CPU pool is allocated as zeros
    want = batch.call(dispatch.resolve("paged_attention", "reference"), sliding_window=window)
    got = batch.call(dispatch.paged_attention, sliding_window=window)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_cache_write_through_dispatch_equals_reference(norm: bool) -> None:
    case = rope_case(norm=norm)
    want = case.call(dispatch.resolve("rope_kv_write", "reference"))
    for got, expected in zip(case.call(dispatch.rope_kv_write), want, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "silu_mul"])
def test_rows_through_dispatch_equal_reference(op: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2.0, 64)
    arguments = {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, x.flip(0), weight, 1e-6),
        "silu_mul": (x,),
    }[op]
    want = dispatch.resolve(op, "reference")(*arguments)
    torch.testing.assert_close(getattr(dispatch, op)(*arguments), want)
