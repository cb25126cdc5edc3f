"""Paged attention: the reference against dense torch, the Triton kernel (interpreted) against the
reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quire_kernels import attention
from quire_kernels.gpu.tiles import choose_tiles
from unit.kernels.kernel_cases import TOLERANCE, PagedBatch, paged_batch


def interpreted(batch: PagedBatch, *, window: int = 0, **tiles: Any) -> torch.Tensor:
    from quire_kernels.gpu.attention import launch
    from quire_kernels.gpu.tiles import Tiles

    chosen = {"block_m": 16, "block_n": 16, "segment": 32, "split": False} | tiles
    out = torch.full_like(batch.q, float("nan"))
    bound = int(batch.seq_lens.max())
    shape = Tiles(**chosen, num_warps=4, num_stages=2)
    launch(shape, out, *batch.tensors(), batch.scale, window, batch.block_size, bound)
    return out


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("window", [0, 5])
def test_reference_equals_dense_attention(window: int) -> None:
    batch = paged_batch([7, 1], [20, 33])
    got = batch.call(attention.paged_attention, sliding_window=window)
    for i, (start, length) in enumerate([(0, 7), (7, 1)]):
        seq_len = int(batch.seq_lens[i])
        position = torch.arange(seq_len - length, seq_len)[:, None]
        key = torch.arange(seq_len)[None]
        mask = (key <= position) & ((key > position - window) | (window == 0))
        dense = F.scaled_dot_product_attention(
            batch.q[start : start + length].transpose(0, 1),
            batch.keys[i].transpose(0, 1),
            batch.values[i].transpose(0, 1),
            attn_mask=mask,
            enable_gqa=True,
        )
        assert_close(got[start : start + length], dense.transpose(0, 1))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "options"),
    [
        ([1, 1], [33, 7], {}),
        ([9, 1], [40, 17], {}),
        ([20], [20], {"head_dim": 80}),
        ([3], [35], {"heads": 7, "kv_heads": 1, "head_dim": 96}),
        ([5], [12], {"heads": 2, "kv_heads": 2, "head_dim": 128, "block_size": 8}),
        ([2], [18], {"heads": 2, "kv_heads": 1, "head_dim": 256}),
        ([4, 1], [21, 16], {"dtype": torch.bfloat16}),
        ([4, 1], [21, 16], {"dtype": torch.float16}),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_triton_equals_reference(
    query_lens: list[int], seq_lens: list[int], options: Any, split: bool
) -> None:
    batch = paged_batch(query_lens, seq_lens, **options)
    assert_close(interpreted(batch, split=split), batch.call(attention.paged_attention))


@pytest.mark.usefixtures("interpreter")
def test_one_running_state_equals_reference() -> None:
    batch = paged_batch([20, 1], [40, 17])
    got = interpreted(batch, block_m=64, segment=0)
    assert_close(got, batch.call(attention.paged_attention))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_triton_sliding_window(window: int, split: bool) -> None:
    batch = paged_batch([9, 1], [37, 40])
    want = batch.call(attention.paged_attention, sliding_window=window)
    assert_close(interpreted(batch, window=window, split=split), want)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("window", [0, 18])
def test_split_gives_the_same_bits(window: int) -> None:
    batch = paged_batch([9, 1], [40, 38])
    assert torch.equal(
        interpreted(batch, split=True, window=window),
        interpreted(batch, split=False, window=window),
    )


@pytest.mark.usefixtures("interpreter")
def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    batch = paged_batch([6, 1], [36, 40])
    together = interpreted(batch)
    assert torch.equal(interpreted(batch.only(0)), together[:6])
    assert torch.equal(interpreted(batch.only(1)), together[6:])


@pytest.mark.usefixtures("interpreter")
def test_a_token_has_the_same_bits_in_any_chunk() -> None:
    """Prefill in one chunk, or the last token alone: same tile shape, same bits."""
    whole = paged_batch([12], [36])
    last = whole.only(0)
    last.q = whole.q[-1:]
    last.query_start_loc = torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(interpreted(last, split=True), interpreted(whole)[-1:])


@pytest.mark.usefixtures("interpreter")
def test_padding_rows_are_zero_and_padding_tokens_untouched() -> None:
    """CUDA graphs pad a batch: requests with seq_len 0, and tokens past the last request."""
    batch = paged_batch([1], [20])
    batch.q = batch.q.repeat(4, 1, 1)
    batch.slots = batch.slots.repeat(3)
    batch.query_start_loc = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    batch.seq_lens = torch.tensor([20, 0, 0], dtype=torch.int32)
    for out in (
        interpreted(batch),
        interpreted(batch, split=True),
        batch.call(attention.paged_attention),
    ):
        assert torch.isfinite(out[0]).all()
        assert (out[1] == 0).all()
        assert torch.isnan(out[2:]).all()


@pytest.mark.usefixtures("interpreter")
def test_public_entry_chooses_its_tiles() -> None:
    from quire_kernels.gpu.attention import paged_attention

    batch = paged_batch([5, 1], [38, 9])
    want = batch.call(attention.paged_attention)
    assert_close(batch.call(paged_attention, fixed_tiles=True, max_seq_len=38), want)
    assert_close(batch.call(paged_attention), want)


@pytest.mark.usefixtures("interpreter")
def test_wrong_block_size_is_refused() -> None:
    batch = paged_batch([1], [4])
    batch.block_size = 32
    from quire_kernels.gpu.attention import paged_attention

    with pytest.raises(ValueError, match="block_size is 32 but the cache holds blocks of 16"):
        batch.call(paged_attention)


SHAPES = [(1, 1), (64, 64), (256, 256), (300, 256), (2048, 1), (8192, 40)]


def tiles_of(num_tokens: int, num_reqs: int, head_dim: int, itemsize: int, **options: Any) -> Any:
    where = {"max_seq_len": 8192, "multiprocessors": 132, "capability": 90}
    return choose_tiles(num_tokens, num_reqs, 4, 8, head_dim, itemsize, **where, **options)


@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (128, 4)])
def test_fixed_tiles_depend_on_the_batch_only_in_the_split(head_dim: int, itemsize: int) -> None:
    chosen = [tiles_of(*shape, head_dim, itemsize, fixed_tiles=True) for shape in SHAPES]
    assert len({replace(t, split=False) for t in chosen}) == 1
    assert {t.split for t in chosen} == {True, False}


@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (128, 4)])
def test_narrow_tiles_share_one_order_of_keys(head_dim: int, itemsize: int) -> None:
    chosen = [tiles_of(*shape, head_dim, itemsize) for shape in SHAPES]
    narrow = {(t.block_n, t.segment) for t in chosen if t.block_m <= 32}
    assert len(narrow) == 1
    (block_n, segment) = narrow.pop()
    assert segment % block_n == 0
    assert not any(t.split for t in chosen if t.block_m > 32)
