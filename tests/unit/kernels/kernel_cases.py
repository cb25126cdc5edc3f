"""Builders for kernel tests, shared with tests/gpu: small paged batches whose unused memory is
poisoned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class PagedBatch:
    """Arguments of `paged_attention`, with the pool they live in."""

    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    k_cache: torch.Tensor  # a strided view of the pool
    v_cache: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_size: int
    keys: list[torch.Tensor]  # per request [seq_len, num_kv_heads, head_dim]
    values: list[torch.Tensor]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.slots,
            self.query_start_loc,
            self.seq_lens,
        )

    def call(self, attention: Any, **options: Any) -> torch.Tensor:
        """Run an implementation on this batch and return `out`, which starts as NaN."""
        out = torch.full_like(self.q, float("nan"))
        attention(out, *self.tensors(), scale=self.scale, block_size=self.block_size, **options)
        return out

    def only(self, index: int) -> PagedBatch:
        """The same request alone, over the same pool."""
        start, stop = self.query_start_loc[index : index + 2].tolist()
        device = self.q.device
        return PagedBatch(
            self.q[start:stop],
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.slots[index : index + 1],
            torch.tensor([0, stop - start], dtype=torch.int32, device=device),
            self.seq_lens[index : index + 1],
            self.block_size,
            self.keys[index : index + 1],
            self.values[index : index + 1],
        )


def paged_batch(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    unused: float = float("nan"),
) -> PagedBatch:
    """Random requests at shuffled blocks and slots of a two-layer pool. Memory of no request holds
    `unused`, and table entries past a request's end are far out of range: reading either shows.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(needed) + 3
    pool = torch.full((num_blocks, 2, 2, kv_heads, block_size, head_dim), unused, dtype=dtype)
    max_slots = len(seq_lens) + 3
    block_table = torch.full((max_slots, max(needed, default=1) + 2), 2**30, dtype=torch.int32)
    slots = torch.randperm(max_slots, generator=generator)[: len(seq_lens)].int()
    free = torch.randperm(num_blocks, generator=generator).tolist()
    keys, values = [], []
    for slot, length, count in zip(slots.tolist(), seq_lens, needed, strict=True):
        kv = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
        keys.append(kv[0].to(device))
        values.append(kv[1].to(device))
        for index in range(count):
            block = free.pop()
            block_table[slot, index] = block
            part = kv[:, index * block_size : (index + 1) * block_size]
            pool[block, 1, :, :, : part.shape[1]] = part.transpose(1, 2)
    q = torch.randn(sum(query_lens), heads, head_dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    pool = pool.to(device)
    return PagedBatch(
        q.to(device),
        pool[:, 1, 0],
        pool[:, 1, 1],
        block_table.to(device),
        slots.to(device),
        starts.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_size,
        keys,
        values,
    )


@dataclass
class RopeCase:
    """Arguments of `rope_kv_write` over a pool of zeros."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    pool: torch.Tensor
    slot_mapping: torch.Tensor
    norms: dict[str, torch.Tensor]

    def call(self, rope_kv_write: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run an implementation on copies -> (rotated q, the whole pool)."""
        fused = torch.cat((self.q, self.k, self.v), dim=1)
        q, k, v = fused.split([self.q.shape[1], self.k.shape[1], self.v.shape[1]], dim=1)
        pool = self.pool.clone()
        place = (pool[:, 1, 0], pool[:, 1, 1], self.slot_mapping)
        rope_kv_write(q, k, v, self.positions, self.cos_sin_cache, *place, **self.norms, eps=1e-6)
        assert torch.equal(k, self.k), "k must stay as it was"
        assert torch.equal(v, self.v), "v must stay as it was"
        return q.clone(), pool


def rope_case(
    *,
    tokens: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    norm: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> RopeCase:
    from quire_kernels.kv_write import build_cos_sin_cache

    generator = torch.Generator().manual_seed(1)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2).float() / rotary_dim)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    slot_mapping = torch.randperm(4 * 16, generator=generator)[:tokens]
    slot_mapping[1] = -1
    norms = {"q_norm": rand(head_dim), "k_norm": rand(head_dim)} if norm else {}
    return RopeCase(
        rand(tokens, heads, head_dim),
        rand(tokens, kv_heads, head_dim),
        rand(tokens, kv_heads, head_dim),
        torch.randint(0, 100, (tokens,), generator=generator).int().to(device),
        build_cos_sin_cache(inv_freq, 128).to(device),
        torch.zeros(4, 2, 2, kv_heads, 16, head_dim, dtype=dtype, device=device),
        slot_mapping.to(device),
        norms,
    )
