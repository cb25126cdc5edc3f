"""Orders between device and host tier against a plain model: contents, names, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_fakes import Planner, i32, make_runner, reference_greedy

from quire.errors import ConfigError, ResourceError
from quire.v1 import step_pb2 as pb
from quire_worker.transfer import Transfer

OFFLOAD, LOAD, ZERO = pb.KV_OP_KIND_OFFLOAD, pb.KV_OP_KIND_LOAD, pb.KV_OP_KIND_ZERO
DEVICE, HOST = 12, 5


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def op(kind, src=(), dst=(), names=(), op_id=1, **fields) -> pb.KvOp:
    return pb.KvOp(
        op_id=op_id, kind=kind, src_block_ids=i32(*src), dst_block_ids=i32(*dst),
        block_names=b"".join(names), **fields,
    )  # fmt: skip


def runner_with_host(num_host_blocks: int = HOST):
    return make_runner(num_blocks=DEVICE, num_host_blocks=num_host_blocks)


def fill(runner, block: int, value: int) -> None:
    runner.kv_cache.pool[block] = value


def held(names) -> dict[int, bytes]:
    ids, column = names.held()
    blocks = np.frombuffer(ids, "<i4").tolist()
    return {block: column[16 * i : 16 * i + 16] for i, block in enumerate(blocks)}


steps = st.lists(
    st.tuples(
        st.sampled_from([OFFLOAD, OFFLOAD, LOAD, ZERO]),
        st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
        st.randoms(use_true_random=False),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(steps)
def test_orders_do_what_a_plain_model_does(orders):
    runner = runner_with_host()
    planner = Planner(runner)
    device = {b: 100 + b for b in range(DEVICE)}  # content; its name is the same number
    host: dict[int, int] = {}
    named: dict[int, int] = {}
    for block, value in device.items():
        fill(runner, block, value)
    pending = []
    for number, (kind, blocks, random) in enumerate(orders):
        others = random.sample(range(DEVICE), len(blocks))
        if kind == OFFLOAD:
            values = [device[b] for b in others]
            pending.append(op(kind, others, blocks, map(name, values), number))
            host.update(zip(blocks, values, strict=True))
        elif kind == LOAD:
            pairs = [(h, d) for h, d in zip(blocks, others, strict=True) if h in host]
            values = [host[h] for h, _ in pairs]
            src, dst = [h for h, _ in pairs], [d for _, d in pairs]
            pending.append(op(kind, src, dst, map(name, values), number))
            device.update(zip(dst, values, strict=True))
            named.update(zip(dst, values, strict=True))
        else:
            pending.append(op(kind, (), others, (), number))
            device.update(dict.fromkeys(others, 0))
            for block in others:
                named.pop(block, None)
        if number % 3 == 2:  # several orders in one plan, one after the other
            assert list(planner.run(kv_ops=pending).kv_ops_done) == [p.op_id for p in pending]
            pending = []
    planner.run(kv_ops=pending)
    assert {b: int(runner.kv_cache.pool[b, 0]) for b in device} == device
    assert held(runner.transfer.names) == {b: name(v) for b, v in named.items()}
    assert held(runner.transfer.host_names) == {b: name(v) for b, v in host.items()}


def test_a_block_that_left_and_came_back_serves_as_a_prefix():
    runner = runner_with_host()
    planner = Planner(runner)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    planner.generate(0, prompt, n=1)
    first, second = planner.blocks[0][:2]
    result = planner.run(
        retire=[0], kv_ops=[op(OFFLOAD, [first, second], [4, 0], [name(1), name(2)])]
    )
    assert list(result.kv_ops_done) == [1]
    # the plan that gives the old blocks to somebody else brings their content back elsewhere
    rows = planner.admit(1, [7] * 8, blocks=[first, second])
    planner.run({1: 8}, admit=[rows])
    back = op(LOAD, [4, 0], [9, 10], [name(1), name(2)], 2)
    admit = planner.admit(2, prompt, computed=8, blocks=[9, 10])
    planner.run({2: 1}, admit=[admit], kv_ops=[back])
    assert planner.outputs[2] == reference_greedy(prompt, 1)
    assert {9, 10} <= set(held(runner.transfer.names))


def test_names_of_both_tiers_outlive_an_epoch():
    runner = runner_with_host()
    planner = Planner(runner)
    fill(runner, 3, 33)
    planner.run(kv_ops=[op(OFFLOAD, [3], [2], [name(33)])])
    later = Planner(runner, epoch=2)
    later.run(kv_ops=[op(LOAD, [2], [5], [name(33)])])
    assert held(runner.transfer.host_names) == {2: name(33)}
    assert held(runner.transfer.names) == {5: name(33)}


def test_a_host_block_loses_its_name_to_the_next_content():
    runner = runner_with_host()
    planner = Planner(runner)
    planner.run(kv_ops=[op(OFFLOAD, [3], [2], [name(1)])])
    planner.run(kv_ops=[op(OFFLOAD, [4], [2], [name(2)])])
    assert held(runner.transfer.host_names) == {2: name(2)}


BAD = {
    "no host tier": (0, op(OFFLOAD, [1], [0], [name(1)])),
    "kv_ops.dst_block_ids: 5 is not between 0 and 4": (5, op(OFFLOAD, [1], [5], [name(1)])),
    "kv_ops.src_block_ids: -1": (5, op(LOAD, [-1], [1], [name(1)])),
    "kv_ops.src_block_ids: 12": (5, op(OFFLOAD, [12], [1], [name(1)])),
    "kv_ops.dst_block_ids: 12": (5, op(LOAD, [1], [12], [name(1)])),
    "src_block_ids has 2": (5, op(OFFLOAD, [1, 2], [1], [name(1)])),
    "block_names has 2": (5, op(OFFLOAD, [1], [1], [name(1), name(2)])),
    "writes a block twice": (5, op(OFFLOAD, [1, 2], [3, 3], [name(1), name(2)])),
    "host block 3 does not hold": (5, op(LOAD, [3], [1], [name(1)])),
    "can't do KV_OP_KIND_RECV": (5, op(pb.KV_OP_KIND_RECV)),
    "can't do KV_OP_KIND_STORE": (5, op(pb.KV_OP_KIND_STORE)),
    "can't do kind 77": (5, pb.KvOp(kind=77)),  # type: ignore[arg-type]
    "fence 1": (5, op(OFFLOAD, [1], [1], [name(1)], fence_seq=1)),
    "no column of 16-byte names": (5, op(OFFLOAD, [1], [1], [b"short"])),
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_order_fails_the_plan_and_ends_the_epoch(message):
    num_host_blocks, wrong = BAD[message]
    runner = runner_with_host(num_host_blocks)
    planner = Planner(runner)
    fill(runner, 1, 11)
    result = runner.execute(planner.plan(kv_ops=[wrong]))
    assert result.status == pb.STEP_STATUS_FAILED and message in result.error
    assert int(runner.kv_cache.pool[1, 0]) == 11 and not list(result.kv_ops_done)
    assert runner.execute(planner.plan()).status == pb.STEP_STATUS_REFUSED


def test_what_is_wrong_in_the_last_order_stops_the_first():
    runner = runner_with_host()
    planner = Planner(runner)
    orders = [op(OFFLOAD, [1], [1], [name(1)]), op(LOAD, [9], [1], [name(1)])]
    assert runner.execute(planner.plan(kv_ops=orders)).status == pb.STEP_STATUS_FAILED
    assert held(runner.transfer.host_names) == {}


def test_loading_what_another_content_replaced_is_refused():
    runner = runner_with_host()
    planner = Planner(runner)
    planner.run(kv_ops=[op(OFFLOAD, [3], [2], [name(1)])])
    fill(runner, 6, 66)
    result = runner.execute(planner.plan(kv_ops=[op(LOAD, [2], [6], [name(2)])]))
    assert "host block 2 does not hold" in result.error
    assert int(runner.kv_cache.pool[6, 0]) == 66


def test_copies_are_a_part_of_the_step_of_their_own():
    runner = runner_with_host()
    planner = Planner(runner)
    result = planner.run(kv_ops=[op(OFFLOAD, [3], [2], [name(1)])])
    assert runner.stats.copy > 0 and runner.stats.num_copied == 1
    assert result.timings.copy_micros == runner.stats.copy // 1000
    planner.run()
    assert runner.stats.copy == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_measuring_gives_the_time_of_one_block(dtype):
    transfer = Transfer(torch.zeros(9, 2, 2, 3, 16, 8, dtype=dtype), 4)
    assert 0 < transfer.measure() < 1


def test_a_host_tier_beyond_memory_names_the_flag():
    with pytest.raises(ResourceError, match="--host-cache-memory"):
        Transfer(torch.zeros(2, 1 << 20, dtype=torch.float32), 1 << 40)


def test_the_flag_needs_the_prefix_cache():
    from quire.config import EngineConfig

    with pytest.raises(ConfigError, match="--enable-prefix-caching"):
        EngineConfig(host_cache_memory=1 << 20, enable_prefix_caching=False).check()
