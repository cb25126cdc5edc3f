"""What is measured before the first plan: the team's size, four points of the step-cost table,
and how long a block takes between the tiers.

Well under a second for a small model. Knows a runner's model and memory, not what the scheduler
does with the figures. It writes into the KV pool's first blocks, which nobody owns yet.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from quire.step_cost import attended
from quire.v1 import step_pb2 as pb
from quire_worker import batch
from quire_worker.runner import Runner
from quire_worker.slots import SlotTable

CHUNK_S = 0.2  # what the chunk may take
SLOW_S = 1.0  # a model whose single step takes longer gets one point only
MAX_CHUNK = 512


def measure(runner: Runner) -> list[pb.StepCost]:
    """One decode row, one long prefill chunk, and both again behind a long context (the chunk
    only a small one): what a token costs, and what the tokens before it.

    The chunk's size follows from a short one's time, so that a slow model is not held up.
    """
    limits = runner.limits
    room = min(limits.num_blocks * limits.block_size, limits.max_model_len)
    first = _step(runner, 1, min(room, 2))  # first calls build kernels and allocate
    if runner.device.type == "cpu" and first < SLOW_S:
        runner.team.calibrate(lambda size: _step(runner, size, size), room)
    points = [_point(runner, 1, 1)]
    single = points[0].micros / 1e6
    if single > SLOW_S:
        return points
    small = min(16, room)
    per_token = max(_step(runner, small, small), 1e-6) / small
    chunk = max(min(MAX_CHUNK, room, int(CHUNK_S / per_token)), small)
    points.append(_point(runner, chunk, chunk))
    context = min(room, 2048)
    if context > 1:
        points.append(_point(runner, 1, context))
    if context > 2 * small:
        points.append(_point(runner, small, context))
    return points


def measure_copy(runner: Runner) -> int:
    """Microseconds that a block takes to or from the host tier, at least 1; 0 without that tier."""
    if not runner.limits.num_host_blocks:
        return 0
    return max(1, round(runner.transfer.measure() * 1e6))


def _point(runner: Runner, num_tokens: int, context: int) -> pb.StepCost:
    times = [_step(runner, num_tokens, context)]
    while len(times) < 3 and sum(times) < 0.05:
        times.append(_step(runner, num_tokens, context))
    return pb.StepCost(
        num_tokens=num_tokens,
        num_context_tokens=context,
        num_attended_tokens=attended(num_tokens, context),
        micros=int(min(times) * 1e6),
    )


@torch.inference_mode()
def _step(runner: Runner, num_tokens: int, context: int) -> float:
    """Seconds of a step of one row: its last num_tokens of `context` tokens."""
    limits = runner.limits
    table = SlotTable(dataclasses.replace(limits, max_slots=1), runner.device)
    blocks = -(-context // limits.block_size)
    table.admit(
        pb.Admit(
            slot=0,
            prompt_token_ids=np.zeros(context, "<i4").tobytes(),
            num_computed_tokens=context - num_tokens,
            block_ids=np.arange(blocks, dtype="<i4").tobytes(),
        )
    )
    begin = time.perf_counter()
    runner.team.gather(num_tokens)
    inputs = batch.build(
        table, np.zeros(1, np.int32), np.array([num_tokens], np.int32), np.ones(1, bool)
    )
    attn = batch.attention_metadata(table, inputs)
    hidden = runner.model.forward(inputs.input_ids, inputs.positions, attn, runner.kv_cache)
    runner.model.compute_logits(hidden[inputs.logits_indices]).argmax(dim=-1).cpu()
    return time.perf_counter() - begin
