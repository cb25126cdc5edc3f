"""The simulated worker: tokens like the oracle's, times like the table's, and no rule unnoticed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.latency_table import LatencyTable
from quire.sampling import SamplingParams
from quire.step_cost import StepSize
from quire.v1 import step_pb2 as pb
from quire_worker.simulated import tokens as hashing
from quire_worker.simulated.times import StepTimes
from quire_worker.simulated.worker import SimulatedWorker

SAMPLE = pb.ROW_FLAG_SAMPLE
BLOCK = 4


def i32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def made(**fields) -> SimulatedWorker:
    sizes = {
        "block_size": BLOCK,
        "num_blocks": 16,
        "max_slots": 4,
        "max_model_len": 32,
        "vocab_size": 101,
    }
    return SimulatedWorker(LatencyTable.constant(1500.0, **{**sizes, **fields}))


def admit(slot: int, prompt: list[int], blocks: list[int], computed: int = 0, **rest) -> pb.Admit:
    return pb.Admit(
        slot=slot,
        request_id=f"r{slot}",
        prompt_token_ids=i32(*prompt),
        num_computed_tokens=computed,
        block_ids=i32(*blocks),
        sampling_params=SamplingParams(seed=7, **rest).to_proto(),
    )


class Plans:
    """Makes plans of one epoch, numbered as they come."""

    def __init__(self, worker: SimulatedWorker, epoch: int = 1) -> None:
        self.worker, self.epoch, self.seq = worker, epoch, 0

    def run(self, rows: list[tuple[int, int, int]] = (), **fields) -> pb.StepResult:
        """rows: (slot, tokens, flags)."""
        self.seq += 1
        plan = pb.StepPlan(
            epoch=self.epoch,
            seq=self.seq,
            slots=i32(*(r[0] for r in rows)),
            num_tokens=i32(*(r[1] for r in rows)),
            flags=bytes(r[2] for r in rows),
            **fields,
        )
        return self.worker.step(plan)[0]

    def fails(self, match: str, *args, **fields) -> None:
        result = self.run(*args, **fields)
        assert result.status == pb.STEP_STATUS_FAILED and match in result.error
        assert len(self.worker.violations) == 1
        assert self.run().status == pb.STEP_STATUS_REFUSED  # the rest of the epoch


PROMPT = [5, 6, 7, 8, 9]


def started(worker: SimulatedWorker) -> Plans:
    """Slot 0 has PROMPT in blocks 1 and 2, and one token out."""
    plans = Plans(worker)
    result = plans.run([(0, 5, SAMPLE)], admit=[admit(0, PROMPT, [1, 2])])
    assert result.status == pb.STEP_STATUS_OK
    return plans


def token(result: pb.StepResult) -> list[int]:
    return np.frombuffer(result.token_ids, "<i4").tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(0, 1 << 31))
def test_arrays_and_plain_integers_make_the_same_tokens(prompt, seed):
    expected, _ = hashing.oracle(
        prompt, seed=seed, max_tokens=5, vocab_size=1001, eos_every=3, ignore_eos=True
    )
    tokens = np.array(prompt, np.int32)
    for _ in range(5):
        states = hashing.prefix_states(tokens)[-1:]
        key = hashing.seed_keys(np.array([seed]))
        tokens = np.append(tokens, hashing.next_tokens(states, key, 1001, 3, 2))
    assert tokens[len(prompt) :].tolist() == expected


def test_a_stream_is_the_oracles_whatever_the_chunks():
    expected, _ = hashing.oracle(PROMPT, seed=7, max_tokens=3, max_model_len=32, vocab_size=101)
    for chunks in ([5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]):
        plans = Plans(made())
        out = []
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            fields = {"admit": [admit(0, PROMPT, [1, 2])]} if i == 0 else {}
            out += token(plans.run([(0, chunk, SAMPLE if last else 0)], **fields))
        out += token(plans.run([(0, 1, SAMPLE)]))
        out += token(plans.run([(0, 1, SAMPLE)]))
        assert out == expected and plans.worker.violations == []


def test_a_shared_prefix_must_be_the_requests_own():
    plans = started(made())
    name = b"n" * 16
    assert plans.run(named_block_ids=i32(1), block_names=name).status == pb.STEP_STATUS_OK
    good = plans.run([(1, 1, SAMPLE)], admit=[admit(1, PROMPT[:4] + [3], [1, 3], 4)])
    assert good.status == pb.STEP_STATUS_OK
    plans.fails("another prefix", [(2, 1, SAMPLE)], admit=[admit(2, [5, 6, 7, 0, 3], [1, 4], 4)])


def test_blocks_may_be_shared_in_the_very_step_that_writes_them():
    worker = made()
    both = [admit(0, PROMPT, [1, 2]), admit(1, PROMPT[:4] + [3], [1, 3], 4)]
    result = Plans(worker).run([(0, 5, SAMPLE), (1, 1, SAMPLE)], admit=both)
    assert result.status == pb.STEP_STATUS_OK, result.error


def test_a_block_that_is_in_use_gets_no_new_owner():
    plans = started(made())
    plans.fails(
        "while a slot holds it", [(1, 5, SAMPLE)], admit=[admit(1, [1, 2, 3, 4, 5], [2, 3])]
    )


def test_a_block_of_a_slot_retired_in_the_same_plan_may_be_given_out():
    plans = started(made())
    result = plans.run(
        [(1, 5, SAMPLE)], admit=[admit(1, [1, 2, 3, 4, 5], [2, 3])], retired_slots=i32(0)
    )
    assert result.status == pb.STEP_STATUS_OK, result.error


def test_a_block_is_given_out_once_a_plan():
    two = [admit(0, PROMPT, [1, 2]), admit(1, PROMPT, [2, 3])]
    Plans(made()).fails("twice", [(0, 5, SAMPLE), (1, 5, SAMPLE)], admit=two)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([(0, 2, SAMPLE)], "nobody knows yet"),
        ([(0, 1, 0)], "wrong SAMPLE flag"),
        ([(1, 1, SAMPLE)], "free slot 1"),
        ([(0, 1, SAMPLE), (0, 1, SAMPLE)], "two rows"),
    ],
)
def test_rows_that_can_not_be(rows, match):
    started(made()).fails(match, rows)


def test_a_table_that_is_too_short():
    plans = started(made())
    for _ in range(3):
        plans.run([(0, 1, SAMPLE)])
    plans.fails("block table shorter", [(0, 1, SAMPLE)])


def test_a_name_is_for_full_blocks_and_one_content():
    started(made()).fails("positions written", named_block_ids=i32(2), block_names=b"n" * 16)
    plans = started(made())
    name = b"n" * 16
    plans.run(named_block_ids=i32(1), block_names=name)
    plans.run([(1, 5, SAMPLE)], admit=[admit(1, [1, 2, 3, 4, 5], [3, 4])])
    plans.fails("two contents", named_block_ids=i32(3), block_names=name)


def test_names_outlive_an_epoch_and_a_new_owner_ends_them():
    worker = made()
    name = b"n" * 16
    started(worker).run(named_block_ids=i32(1), block_names=name)
    later = Plans(worker, epoch=2)
    result = later.run([(0, 1, SAMPLE)], admit=[admit(0, PROMPT, [1, 2], 4)])
    assert result.status == pb.STEP_STATUS_OK, result.error
    assert worker.hello().held_block_names == name
    later.run(retired_slots=i32(0))
    later.run([(0, 5, SAMPLE)], admit=[admit(0, PROMPT, [1, 2])])
    assert worker.hello().held_block_names == b""


def test_the_host_tier_keeps_content_and_names():
    worker = made(num_host_blocks=4)
    plans = started(worker)
    name = b"n" * 16
    plans.run(named_block_ids=i32(1), block_names=name)
    order = {"block_names": name, "fence_seq": 0}
    out = pb.KvOp(op_id=1, kind=pb.KV_OP_KIND_OFFLOAD, src_block_ids=i32(1), dst_block_ids=i32(3),
                  **order)  # fmt: skip
    result = plans.run(retired_slots=i32(0), kv_ops=[out])
    assert list(result.kv_ops_done) == [1]
    plans.run([(0, 5, SAMPLE)], admit=[admit(0, [1] * 5, [1, 2])])  # over the old block
    back = pb.KvOp(op_id=2, kind=pb.KV_OP_KIND_LOAD, src_block_ids=i32(3), dst_block_ids=i32(5),
                   **order)  # fmt: skip
    result = plans.run([(1, 1, SAMPLE)], kv_ops=[back], admit=[admit(1, PROMPT, [5, 6], 4)])
    assert result.status == pb.STEP_STATUS_OK, result.error
    hello = worker.hello()
    assert hello.held_host_block_ids == i32(3) and hello.held_host_block_names == name
    wrong = pb.KvOp(op_id=3, kind=pb.KV_OP_KIND_LOAD, src_block_ids=i32(2), dst_block_ids=i32(7),
                    **order)  # fmt: skip
    plans.fails("does not hold", kv_ops=[wrong])


def test_an_admission_may_go_on_inside_its_block():
    worker = made()
    plans = started(worker)
    first, _ = hashing.oracle(PROMPT, seed=7, max_tokens=2, max_model_len=32, vocab_size=101)
    plans.run([(0, 1, SAMPLE)])
    later = Plans(worker, epoch=2)
    again = admit(0, PROMPT, [1, 2], 6)
    again.output_token_ids = i32(*first)
    result = later.run([(0, 1, SAMPLE)], admit=[again])
    assert result.status == pb.STEP_STATUS_OK, result.error
    third, _ = hashing.oracle(PROMPT, seed=7, max_tokens=3, max_model_len=32, vocab_size=101)
    assert token(result) == third[2:]
    wrong = Plans(worker, epoch=3)
    again.prompt_token_ids = i32(1, 2, 3, 4, 5)
    wrong.fails("can't go on", [(0, 1, SAMPLE)], admit=[again])


def test_plans_run_once_in_order_and_results_are_kept():
    worker = made()
    plans = started(worker)
    first = plans.run([(0, 1, SAMPLE)])
    plans.seq -= 1
    assert plans.run([(0, 1, SAMPLE)]) == first and worker.num_steps == 2
    plans.seq += 1
    late = plans.run([(0, 1, SAMPLE)])
    assert late.status == pb.STEP_STATUS_REFUSED and "missing" in late.error
    assert Plans(worker, epoch=0).run().status == pb.STEP_STATUS_REFUSED


def test_a_step_takes_what_the_table_says():
    worker = made()
    plan = pb.StepPlan(
        epoch=1, seq=1, slots=i32(0), num_tokens=i32(5), flags=bytes([SAMPLE]),
        admit=[admit(0, PROMPT, [1, 2])],
    )  # fmt: skip
    result, seconds = worker.step(plan)
    assert seconds == pytest.approx(0.0015) and result.timings.forward_micros == 1500


def test_measured_steps_are_drawn_from_those_alike():
    rng = np.random.default_rng(3)
    points = []
    for _ in range(400):  # decodes at 1 ms, one in ten at 3 ms; chunks at 20 ms
        points.append((8, 800, 800, 8, 3000.0 if rng.random() < 0.1 else 1000.0))
        points.append((256, 256, 32896, 1, 20000.0))
    times = StepTimes(points, seed=1)
    small = sorted(times.draw(StepSize(8, 800, 800, 8)) for _ in range(500))
    assert small[250] == pytest.approx(0.001, rel=0.02)
    assert small[-1] == pytest.approx(0.003, rel=0.02)
    assert times.draw(StepSize(256, 256, 32896, 1)) == pytest.approx(0.02, rel=0.02)
    again = StepTimes(points, seed=1)
    assert small == sorted(again.draw(StepSize(8, 800, 800, 8)) for _ in range(500))


def test_ranks_but_the_first_acknowledge():
    table = LatencyTable.constant(1.0, block_size=BLOCK)
    answer = SimulatedWorker(table, rank=1, tp_size=2).execute(pb.StepPlan(epoch=1, seq=1))
    assert isinstance(answer, pb.Ack) and answer.status == pb.STEP_STATUS_OK


def test_it_needs_no_torch():
    code = "import quire_worker.simulated.main, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
