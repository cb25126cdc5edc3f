"""The KV pool: one tensor of blocks, its layers as views, and how many blocks there can be.

Knows bytes and memory, not who owns a block or what is in it. The pool is zeroed when made: a
masked key has weight 0, and that silences any finite value but not a NaN.
"""

from __future__ import annotations

import logging
import math
import mmap
from dataclasses import dataclass

import torch

from quire.errors import ResourceError
from quire_worker import backends
from quire_worker.models.config import DecoderConfig

log = logging.getLogger("quire.worker")

_CPU_CAP = 4 << 30
_CPU_SHARE = 0.4  # of what the machine or cgroup has free
_GPU_RESERVE = 512 << 20  # activations and workspaces of a step


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The shape of one block: K and V of `block_size` tokens in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def from_config(
        cls, config: DecoderConfig, *, dtype: torch.dtype, block_size: int = 16
    ) -> KVCacheSpec:
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        return (
            self.num_layers
            * 2
            * self.num_kv_heads
            * self.block_size
            * self.head_dim
            * self.dtype.itemsize
        )


class KVCache:
    """pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; a block is one
    contiguous record.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = spec.block_size
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        try:
            self.pool = zeros(shape, spec.dtype, device)
        except (RuntimeError, OSError) as error:  # torch's allocators; the kernel's, for mmap
            raise ResourceError(
                f"the KV pool of {num_blocks} blocks needs "
                f"{readable(num_blocks * spec.block_bytes)} and could not be allocated on "
                f"{device}; lower --kv-cache-memory-bytes or --num-gpu-blocks-override."
            ) from error
        self._layers = [(self.pool[:, i, 0], self.pool[:, i, 1]) for i in range(spec.num_layers)]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_cache, v_cache), strided views [num_blocks, num_kv_heads, block_size, head_dim]."""
        return self._layers[number]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU in fresh anonymous pages, so that memory is used when a block first is."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def plan_num_blocks(
    spec: KVCacheSpec,
    device: torch.device,
    *,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    num_gpu_blocks_override: int | None = None,
    max_model_len_is_auto: bool = True,
) -> int:
    """How many blocks the pool gets: an explicit number, explicit bytes, or what memory allows and
    requests can use.

    Call after the weights are loaded. Raises ResourceError with the remedy when not one block fits,
    or, with max_model_len_is_auto=False, when not one sequence of max_model_len tokens does. With
    auto the caller shortens the context to what the pool holds.
    """
    blocks_per_sequence = math.ceil(max_model_len / spec.block_size)
    usable = 1 + blocks_per_sequence * max_num_seqs  # block 0 belongs to nobody
    if num_gpu_blocks_override:
        num_blocks = num_gpu_blocks_override
        room, flag = num_blocks * spec.block_bytes, "--num-gpu-blocks-override"
    else:
        room, flag = _room(device, kv_cache_memory_bytes, gpu_memory_utilization)
        num_blocks = min(room // spec.block_bytes, usable)
    wanted = 2 if max_model_len_is_auto else 1 + blocks_per_sequence
    if num_blocks < wanted:
        raise ResourceError(_too_small(spec, num_blocks, wanted, room, flag, max_model_len))
    return num_blocks


def _room(device: torch.device, explicit: int | None, utilization: float) -> tuple[int, str]:
    """(bytes the pool may take, the flag that changes it)."""
    if explicit:
        return explicit, "--kv-cache-memory-bytes"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used_by_others = total - free
        return max(
            int(total * utilization) - used_by_others - _GPU_RESERVE, 0
        ), "--gpu-memory-utilization"
    return min(_CPU_CAP, int(backends.free_memory_bytes() * _CPU_SHARE)), "--kv-cache-memory-bytes"


def _too_small(
    spec: KVCacheSpec, num_blocks: int, wanted: int, room: int, flag: str, max_model_len: int
) -> str:
    need = wanted * spec.block_bytes
    longest = max(num_blocks - 1, 0) * spec.block_size
    tokens = max_model_len if wanted > 2 else spec.block_size
    value = wanted if flag == "--num-gpu-blocks-override" else f"{need} bytes"
    if flag == "--gpu-memory-utilization":
        remedy = f"raise {flag}, free memory on the device"
    else:
        remedy = f"raise {flag} to at least {value}"
    shorter = f", or lower --max-model-len to at most {longest}" if longest else ""
    return (
        f"the KV cache of one sequence of {tokens} tokens needs {readable(need)} ({wanted} blocks, "
        f"one of them the null block), but there is room for {readable(room)} "
        f"({num_blocks} blocks); {remedy}{shorter}."
    )


def readable(num_bytes: int) -> str:
    """'1.50 GiB'."""
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << width:
            return f"{num_bytes / (1 << width):.2f} {unit}"
    return f"{num_bytes} bytes"
