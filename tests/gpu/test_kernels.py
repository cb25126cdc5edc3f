"""The Triton kernels on a real GPU, in real dtypes, against the torch references there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from quire_kernels import act, attention, dispatch, kv_write, norm, sampling
from unit.kernels.kernel_cases import TOLERANCE, paged_batch, rope_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DECODE = ([1] * 6, [1, 16, 511, 512, 513, 3000])
MIXED = ([700, 1, 65, 1], [700, 900, 2100, 15])


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("fixed_tiles", [False, True])
def test_attention(lens: Any, head_dim: int, dtype: torch.dtype, fixed_tiles: bool) -> None:
    batch = paged_batch(*lens, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    got = batch.call(dispatch.paged_attention, fixed_tiles=fixed_tiles, max_seq_len=3000)
    assert_close(got, batch.call(attention.paged_attention))


@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("window", [1, 100, 1000])
def test_sliding_window(lens: Any, window: int) -> None:
    batch = paged_batch(*lens, head_dim=128, dtype=torch.bfloat16, device="cuda")
    got = batch.call(dispatch.paged_attention, sliding_window=window)
    assert_close(got, batch.call(attention.paged_attention, sliding_window=window))


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("window", [0, 700])
def test_split_gives_the_same_bits(window: int, block_m: int) -> None:
    from quire_kernels.gpu.attention import launch
    from quire_kernels.gpu.tiles import Tiles

    batch = paged_batch(*MIXED, heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    outs = []
    for split in (False, True):
        out = torch.empty_like(batch.q)
        tiles = Tiles(block_m, 64, 512, split, num_warps=4, num_stages=3)
        launch(tiles, out, *batch.tensors(), batch.scale, window, 16, 2100)
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fixed_tiles_give_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    batch = paged_batch(*MIXED, heads=8, head_dim=128, dtype=dtype, device="cuda")
    together = batch.call(dispatch.paged_attention, fixed_tiles=True)
    starts = batch.query_start_loc.tolist()
    for i in range(len(MIXED[0])):
        alone = batch.only(i).call(dispatch.paged_attention, fixed_tiles=True)
        assert torch.equal(alone, together[starts[i] : starts[i + 1]])


def test_attention_replays_in_a_cuda_graph() -> None:
    batch = paged_batch(*DECODE, head_dim=128, dtype=torch.bfloat16, device="cuda")
    want = batch.call(dispatch.paged_attention)
    out = torch.zeros_like(batch.q)

    def step() -> None:
        options = {"scale": batch.scale, "block_size": batch.block_size}
        dispatch.paged_attention(out, *batch.tensors(), **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"head_dim": 128, "norm": True}, {"head_dim": 80}, {"rotary_dim": 32, "norm": True}],
)
def test_rope_kv_write(options: Any, dtype: torch.dtype) -> None:
    case = rope_case(tokens=33, heads=12, kv_heads=4, dtype=dtype, device="cuda", **options)
    want = case.call(kv_write.rope_kv_write)
    for got, expected in zip(case.call(dispatch.rope_kv_write), want, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 896, 4096, 5120])
def test_norms_and_activation(hidden: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 37, 2 * hidden, device="cuda").to(dtype)
    weight = torch.randn(2 * hidden, device="cuda").to(dtype)
    assert_close(dispatch.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6))
    got, total = dispatch.add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, want_total)
    assert_close(got, want)
    assert_close(dispatch.silu_mul(x), act.silu_mul(x))


def test_noise_equals_reference() -> None:
    from unit.kernels.noise_kernel import triton_noise

    bits = torch.randint(0, 2**32, (1 << 20,), device="cuda")
    bits[:4] = torch.tensor([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
    want = sampling.bits_to_gumbel(bits)
    torch.testing.assert_close(triton_noise(bits), want, atol=4e-6, rtol=2e-6)


@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_sample_equals_reference(vocab: int) -> None:
    n = 32
    logits = torch.randn(n, vocab, device="cuda") * 3
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), device="cuda")
    positions = torch.arange(n, device="cuda", dtype=torch.int32)
    temperatures = (positions % 4 != 0).float()
    got = dispatch.sample(logits, seeds, positions, temperatures)
    scores = logits + sampling.gumbel_noise(seeds, positions, vocab) * temperatures[:, None]
    # The device's logarithm differs in the last bits, so the winner may trail by that much.
    best = scores.amax(dim=-1)
    assert (best - scores.gather(1, got[:, None])[:, 0] < 1e-5).all()
    assert torch.equal(got[::4], logits[::4].argmax(dim=-1))


def test_a_row_draws_the_same_token_alone() -> None:
    logits = torch.randn(16, 32_000, device="cuda")
    seeds, positions = torch.arange(16, device="cuda"), torch.arange(16, device="cuda")
    ones = torch.ones(16, device="cuda")
    together = dispatch.sample(logits, seeds, positions, ones)
    for i in range(16):
        one = slice(i, i + 1)
        assert dispatch.sample(logits[one], seeds[one], positions[one], ones[one]) == together[i]
