"""The host tier on a GPU: pinned memory, copies on the compute stream, in the order of the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.v1 import step_pb2 as pb
from quire_worker.transfer import Order, Transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def order(kind: int, src: list[int], dst: list[int], numbers: list[int]) -> Order:
    names = np.array([list(n.to_bytes(16, "little")) for n in numbers], np.uint8)
    return Order(1, kind, np.array(src, np.int32), np.array(dst, np.int32), names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_leave_and_come_back_in_order(dtype: torch.dtype) -> None:
    pool = torch.arange(64, dtype=dtype, device="cuda").view(64, 1, 1, 1, 1, 1)
    pool = pool.expand(64, 4, 2, 2, 16, 64).contiguous()
    transfer = Transfer(pool, 16)
    transfer.run(order(pb.KV_OP_KIND_OFFLOAD, [5, 6, 9], [0, 1, 15], [5, 6, 9]))
    pool[5:10] = -1  # the rows of the plan, on the same stream
    transfer.run(order(pb.KV_OP_KIND_LOAD, [15, 0], [20, 21], [9, 5]))
    transfer.finish()
    assert pool[20].eq(9).all() and pool[21].eq(5).all() and pool[5:10].eq(-1).all()
    assert pool[22].eq(22).all() and transfer.measure() > 0
