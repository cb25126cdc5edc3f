"""Block copies in plan order: the host tier, and the kv_ops of a plan.

Knows blocks and names, not prefixes or why a block moves. Orders of a plan run one after the other
before its rows, so what an order frees or fills is settled when the rows read and write.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.errors import ResourceError
from quire.v1 import step_pb2 as pb
from quire_worker.columns import Limits, PlanError, block_names, ids, same_length
from quire_worker.kv_cache import readable, zeros
from quire_worker.names import BlockNames


@dataclass(frozen=True, slots=True)
class Order:
    """One checked KvOp: every id exists, dst is distinct."""

    op_id: int
    kind: pb.KvOpKind
    src: np.ndarray  # i32 [n]; [0] for ZERO
    dst: np.ndarray  # i32 [n]
    names: np.ndarray  # u8 [n, 16]; [0, 16] for ZERO


def read_orders(plan: pb.StepPlan, limits: Limits) -> list[Order]:
    """The plan's kv_ops. Raises PlanError before anything is copied."""
    return [_read(op, plan.seq, limits) for op in plan.kv_ops]


def _read(op: pb.KvOp, seq: int, limits: Limits) -> Order:
    if op.fence_seq >= seq:
        raise PlanError(f"kv_ops: the fence {op.fence_seq} of op {op.op_id} is not reached.")
    device, host = limits.num_blocks, limits.num_host_blocks
    if op.kind == pb.KV_OP_KIND_ZERO:
        src_high, dst_high = 0, device
    elif op.kind == pb.KV_OP_KIND_OFFLOAD:
        src_high, dst_high = device, host
    elif op.kind == pb.KV_OP_KIND_LOAD:
        src_high, dst_high = host, device
    else:
        raise PlanError(f"kv_ops: this worker can't do {_kind_name(op.kind)}.")
    if op.kind != pb.KV_OP_KIND_ZERO and not host:
        raise PlanError(
            f"kv_ops: {_kind_name(op.kind)}, but this worker has no host tier "
            "(--host-cache-memory)."
        )
    dst = ids(op.dst_block_ids, dst_high, "kv_ops.dst_block_ids")
    src = ids(op.src_block_ids, src_high, "kv_ops.src_block_ids")
    names = block_names(op.block_names, "kv_ops.block_names")
    if op.kind != pb.KV_OP_KIND_ZERO:
        same_length("kv_ops.src_block_ids", src, "kv_ops.dst_block_ids", dst)
        same_length("kv_ops.block_names", names, "kv_ops.dst_block_ids", dst)
    if len(np.unique(dst)) < len(dst):
        raise PlanError(f"kv_ops.dst_block_ids: op {op.op_id} writes a block twice.")
    return Order(op.op_id, op.kind, src, dst, names)


def _kind_name(kind: int) -> str:
    try:
        return pb.KvOpKind.Name(kind)
    except ValueError:
        return f"kind {kind}"


class Transfer:
    """The device pool, the host pool beside it, and the names of both tiers' blocks.

    pool: [num_blocks, ...], contiguous; a block is one record. On a GPU host memory is pinned and
    copies run on the compute stream; on CPU pages are used when a block first is.
    """

    def __init__(self, pool: torch.Tensor, num_host_blocks: int = 0) -> None:
        self.num_host_blocks = num_host_blocks
        self._pool = pool
        self._on_gpu = pool.device.type == "cuda"
        self._device = self._records(pool)
        self._host = self._records(self._host_pool()) if num_host_blocks else None
        self.names = BlockNames(pool.shape[0])
        self.host_names = BlockNames(num_host_blocks)

    def run(self, order: Order) -> None:
        """Do one order. Raises PlanError when a block to load holds something else; then nothing
        of the order is done."""
        if order.kind == pb.KV_OP_KIND_ZERO:
            self.names.forget(order.dst)
            self._pool[torch.from_numpy(order.dst.astype(np.int64)).to(self._pool.device)] = 0
        elif order.kind == pb.KV_OP_KIND_OFFLOAD:
            self.host_names.forget(order.dst)
            self.copy_out(order.src, order.dst)
            self.host_names.give(order.dst, order.names)
        else:
            known = self.host_names.is_named[order.src]
            same = known & (self.host_names.names[order.src] == order.names).all(axis=1)
            if not same.all():
                raise PlanError(
                    f"kv_ops: host block {int(order.src[~same][0])} does not hold what "
                    f"op {order.op_id} is to load."
                )
            self.names.forget(order.dst)
            self.copy_in(order.src, order.dst)
            self.names.give(order.dst, order.names)

    def finish(self) -> None:
        """Wait until the copies are done."""
        if self._on_gpu:
            torch.cuda.current_stream(self._pool.device).synchronize()

    def copy_out(self, device_ids: np.ndarray, host_ids: np.ndarray) -> None:
        """Blocks device_ids [n] of the device to blocks host_ids [n] of the host."""
        self._copy(self._device, self._host, device_ids, host_ids)

    def copy_in(self, host_ids: np.ndarray, device_ids: np.ndarray) -> None:
        """Blocks host_ids [n] of the host to blocks device_ids [n] of the device."""
        self._copy(self._host, self._device, host_ids, device_ids)

    def measure(self, rounds: int = 5, most: int = 8) -> float:
        """Seconds that one block takes to or from the device, median. Overwrites the first blocks
        of both tiers, which nobody owns yet."""
        n = min(most, self.num_host_blocks, self._pool.shape[0])
        some = np.arange(n)
        apart = some[::-1]  # no run of neighbours: the slow case, and the usual one
        times: list[float] = []
        for copy in [self.copy_out, self.copy_in] * (rounds + 1):
            begin = time.perf_counter()
            copy(some, apart)
            self.finish()
            times.append((time.perf_counter() - begin) / n)
        return float(np.median(times[2:]))  # the first ones touch fresh pages

    def _copy(self, source: Any, target: Any, src: np.ndarray, dst: np.ndarray) -> None:
        for begin, end in _runs(src, dst):
            a, b, n = int(src[begin]), int(dst[begin]), end - begin
            if self._on_gpu:
                target[b : b + n].copy_(source[a : a + n], non_blocking=True)
            else:
                target[b : b + n] = source[a : a + n]

    def _host_pool(self) -> torch.Tensor:
        pool = self._pool
        shape = (self.num_host_blocks, *pool.shape[1:])
        try:
            if self._on_gpu:
                return torch.empty(shape, dtype=pool.dtype, pin_memory=True)
            return zeros(shape, pool.dtype, pool.device)
        except (RuntimeError, OSError) as error:
            size = readable(self.num_host_blocks * pool[0].nbytes)
            raise ResourceError(
                f"the host tier of {self.num_host_blocks} blocks needs {size} of host memory and "
                "could not be allocated; lower --host-cache-memory."
            ) from error

    def _records(self, pool: torch.Tensor) -> Any:
        """[num_blocks, block_bytes] over the same memory: numpy on CPU, where a copy is one
        memcpy without a team of threads; a tensor on a GPU."""
        records = pool.view(torch.uint8).view(pool.shape[0], -1)
        return records if self._on_gpu else records.numpy()


def _runs(src: np.ndarray, dst: np.ndarray) -> Iterator[tuple[int, int]]:
    """[begin, end) of the stretches in which both ids go up by one."""
    if not len(src):
        return
    cuts = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    ends = [*cuts.tolist(), len(src)]
    begin = 0
    for end in ends:
        yield begin, end
        begin = end
