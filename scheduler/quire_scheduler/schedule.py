"""schedule(): who computes how many tokens in the next step.

No phases: every request has tokens computed and tokens wanted, and each step hands out a budget
until computed catches up; running requests first, then waiting ones. Knows no wire, no clock and
no worker. Work per row is numpy; Python objects are touched for events only (admission, a new
block, preemption). How the budget is shared is decided in shares.py.
"""

from __future__ import annotations

import numpy as np

from quire.step_cost import STEP_TARGET_S, StepSize, attended
from quire_scheduler.columns import I32, Bool, Columns, Slots
from quire_scheduler.plan import Plan
from quire_scheduler.preemption import Victim, pick_victim
from quire_scheduler.request import Request
from quire_scheduler.shares import SHARERS, Limits, blocks_for, hand_out
from quire_scheduler.state import State


def schedule(state: State, limits: Limits, epoch: int, seq: int) -> Plan | None:
    """The next plan, with the state changed as if it was sent; None when there is nothing to do.

    A plan without rows is made only to load blocks, or to retire slots while nothing else is in
    flight.
    """
    columns, kv = state.columns, state.kv
    plan = Plan(epoch, seq)
    wanted = columns.wanted  # [top], as `given`; what stands beside `slots` is [num_rows]
    slots = runnable(state)
    wants_each = wanted[slots]
    prompts = bool(np.count_nonzero(wants_each > 1))
    if prompts:
        slots = in_order(columns, slots, wants_each > 1)
        wants_each = wanted[slots]
    if kv.host is not None:
        decoding = np.count_nonzero(wants_each == 1)
        kv.host.limit_s = limits.copy_s if decoding else STEP_TARGET_S
    rivals, wants = _rivals(state, limits)
    budget = limits.max_num_batched_tokens
    whole = not prompts and not rivals and len(slots) <= budget  # every row decodes, as it wants
    for_prompts, nums, shares = budget, wants_each, [0] * len(rivals)
    if not whole:
        for_prompts = _for_prompts(state, limits, slots, wants_each, bool(rivals))
        last_seq = columns.last_seq[slots]
        nums, shares = hand_out(wants_each, last_seq, wants, budget, for_prompts)
    given = np.zeros(len(wanted), np.int32)
    given[slots] = nums

    num_running = state.num_running
    _make_room(state, plan, given, prompts)
    preempted = state.num_running < num_running
    if preempted or not whole:
        nums = given[slots]
        slots, nums = slots[nums > 0], nums[nums > 0]
    _commit_running(state, plan, slots, nums, given, wanted, prompts)
    if state.num_waiting and not preempted:
        left = budget - plan.total_tokens
        left = min(left, for_prompts - int(nums[nums > 1].sum()))
        _admit(state, limits, plan, left, dict(zip(rivals, shares, strict=True)))
    loads = kv.host is not None and kv.host.num_ordered_loads > 0
    if not len(plan.slots) and not loads and (state.in_flight or not state.to_retire):
        return None
    plan.retired_slots = np.array(state.to_retire, np.int32)
    state.to_retire.clear()
    plan.named_block_ids, plan.block_names = kv.take_named(seq)
    if kv.host is not None:
        plan.copies = kv.host.take(seq)
        plan.copies_s = plan.num_copied_blocks * kv.host.copy_s
    state.in_flight.append(plan)
    return plan


def runnable(state: State) -> Slots:
    """Running slots that may have a row, ascending: those whose tokens in flight do not complete
    them, and, while suspects are on probation, only theirs."""
    columns, top = state.columns, state.columns.top
    ok = columns.running[:top] & (columns.num_expected[:top] < columns.max_total[:top])
    slots: Slots = ok.nonzero()[0]
    if state.probation.active:
        members = [
            request is not None and state.probation.is_member(request)
            for request in map(columns.requests.__getitem__, slots.tolist())
        ]
        slots = slots[np.array(members, np.bool_)]
    return slots


def in_order(columns: Columns, slots: Slots, is_prompt: Bool) -> Slots:
    """The slots [n], decoding ones, then prompts in order of admission."""
    prompts = slots[is_prompt]
    return np.concatenate((slots[~is_prompt], prompts[columns.started[prompts].argsort()]))


def _for_prompts(state: State, limits: Limits, slots: Slots, wanted: I32, rivals: bool) -> int:
    """Tokens that prompts may have in this step, so that the rows decoding beside them keep their
    pace. Without such rows, or without a target, all of the budget."""
    budget = limits.max_num_batched_tokens
    if limits.prompt_tokens is None or not (rivals or (wanted > 1).any()):
        return budget
    decoding = slots[wanted == 1]
    if not len(decoding):
        return budget
    lengths = int(state.columns.num_computed_tokens[decoding].sum()) + len(decoding)
    size = StepSize(len(decoding), lengths, lengths, len(decoding))
    prompts = state.columns.num_computed_tokens[slots[wanted > 1]]
    return min(budget, limits.prompt_tokens(size, int(prompts.max(initial=0))))


def _rivals(state: State, limits: Limits) -> tuple[list[Request], list[int]]:
    """The next newcomers as far as they can start now, and the tokens each wants; nothing is
    set aside for one that could not use it."""
    rivals: list[Request] = []
    wants: list[int] = []
    kv = state.kv
    room = min(SHARERS, state.columns.num_free, limits.max_num_seqs - state.num_running)
    for request in state.queue.first(room) if room > 0 else ():
        cached = 0
        if request.slot < 0:
            cached = kv.peek_prefix(request.tokens, request.namespace)
        if request.slot >= 0 or not _has_room(state, request, cached // kv.block_size):
            break
        rivals.append(request)
        wants.append(len(request.tokens) - cached)
    return rivals, wants


def _make_room(state: State, plan: Plan, given: I32, prompts: bool) -> None:
    """Blocks for the rows, tokens `given` [top] by slot; preempts until they fit, and takes away
    what was given to the victims."""
    columns, kv, top = state.columns, state.kv, len(given)  # a victim may lower columns.top
    while True:
        ends = columns.num_computed_tokens[:top] + given
        short = (ends > kv.tables.num_blocks[:top] * kv.block_size) & (given > 0)
        rows = short.nonzero()[0]
        if not len(rows):
            return
        need = None  # a block each
        if prompts:
            need = blocks_for(ends[rows], kv.block_size) - kv.tables.num_blocks[rows]
        ids = kv.allocate_many(rows, need)
        if ids is not None:
            plan.new_block_rows = rows if need is None else np.repeat(rows, need)
            plan.new_block_ids = ids
            return
        slots = state.running_slots
        victim = pick_victim(columns, slots, state.cost, kv.host, kv.block_size)
        preempt(state, victim, plan.seq)
        given[victim.slot] = 0


def preempt(state: State, victim: Victim, seq: int) -> None:
    """The victim stops running; plan `seq` is the first without it.

    Its full blocks stay cached under their names. Whoever takes one of them lets the host copy it
    first, if that is cheaper than computing it anew: nothing is copied that stays.
    """
    request = state.columns.requests[victim.slot]
    assert request is not None
    known = min(request.num_tokens - 1, request.num_computed_tokens)
    publish(state, np.array([victim.slot]), np.array([known], np.int32), seq - 1)
    state.preempt(request, offload=victim.offload)


def _commit_running(
    state: State,
    plan: Plan,
    slots: Slots,
    nums: I32,
    given: I32,
    wanted: I32,
    prompts: bool,
) -> None:
    """The rows [n] are in the plan; `given` [top] is `nums` by slot."""
    columns, top = state.columns, len(given)
    start = columns.num_computed_tokens[:top]
    has_row = given > 0
    sampling = has_row & (given == wanted)
    forced = has_row & (start < columns.num_forced[:top])
    start += given
    columns.num_expected[:top] += sampling
    columns.last_seq[slots] = plan.seq
    plan.slots, plan.num_tokens, plan.flags = slots, nums, columns.flags[slots]
    plan.num_sampled = int(np.count_nonzero(sampling))
    ends = start[slots]
    plan.num_context_tokens = plan.num_attended_tokens = int(np.add.reduce(ends))
    plan.total_tokens = len(slots)
    if prompts:
        wide = nums.astype(np.int64)
        plan.total_tokens = int(wide.sum())
        plan.num_attended_tokens = int((wide * ends - wide * (wide - 1) // 2).sum())
    if plan.num_sampled < len(slots):
        plan.flags[~sampling[slots]] = 0
    # Forced tokens are published when the plan that computes them is made: later requests of this
    # very plan may share them, for a step writes KV before it attends.
    slots = forced.nonzero()[0]
    if len(slots):
        publish(state, slots, np.minimum(columns.num_forced[slots], start[slots]), plan.seq)


def publish(state: State, slots: Slots, known: I32, seq: int) -> None:
    """Offer blocks that became full to the prefix cache: `known` [n] tokens of each slot."""
    columns, kv = state.columns, state.kv
    full = known // kv.block_size
    for i in np.flatnonzero(full > kv.tables.num_published[slots]).tolist():
        slot = int(slots[i])
        handle = columns.kv[slot]
        assert handle is not None
        kv.publish(handle, columns.token_ids[slot, : known[i]], seq)


def publish_outputs(state: State, seq: int) -> None:
    """Output blocks whose content is certain (all but the last confirmed token), and the names of
    all that is published. Deferred work, done while the worker computes."""
    columns, kv = state.columns, state.kv
    top = columns.top
    known = np.minimum(columns.num_tokens[:top] - 1, columns.num_computed_tokens[:top])
    full = known // kv.block_size
    new = columns.running[:top] & (full > kv.tables.num_published[:top])
    slots = new.nonzero()[0]
    kv.publish_many(slots, full[slots], columns.token_blocks, seq)


def _admit(
    state: State, limits: Limits, plan: Plan, budget: int, shares: dict[Request, int]
) -> None:
    """Newcomers, in the queue's order, until one does not fit. `shares` keeps part of the budget
    for later ones."""
    columns, kv, queue = state.columns, state.kv, state.queue
    rows: list[tuple[int, int, int]] = []  # slot, tokens, flags
    whole = bool((plan.num_tokens > 1).any())  # a prompt is in this step already
    reserved = sum(shares.values())
    while budget > 0 and columns.num_free and state.num_running < limits.max_num_seqs:
        head = queue.first(1)
        if not head or head[0].slot >= 0:  # its tokens are still in flight
            break
        request = head[0]
        reserved -= shares.pop(request, 0)
        _, handle = kv.match_prefix(
            request.tokens,
            request.namespace,
            owner=request.request_id,
            row=columns.next_free,
        )
        room = _has_room(state, request, handle.num_blocks)
        if not room or not kv.load_prefix(handle, request.tokens, plan.seq):
            kv.release(handle)
            break
        cached = handle.num_cached_tokens
        wanted = len(request.tokens) - cached
        count = min(wanted, max(budget - reserved, 1))
        if not limits.enable_chunked_prefill and count < wanted:
            # a prompt beyond the budget runs whole, as the only prompt of its step
            count = wanted if budget >= wanted or not (whole or rows) else 0
        end = cached + count
        blocks = -(-end // kv.block_size) - handle.num_blocks
        if count < 1 or kv.allocate_for(handle, blocks) is None:
            kv.release(handle)
            break
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = min(cached, request.num_prompt_tokens)
        slot = columns.attach(request, handle, cached)
        state.start(request)
        columns.num_computed_tokens[slot] = end
        columns.num_expected[slot] += count == wanted
        columns.last_seq[slot] = plan.seq
        publish(state, np.array([slot]), np.array([end], np.int32), plan.seq)
        plan.admitted.append((request, cached))
        plan.total_tokens += count
        plan.num_sampled += count == wanted
        plan.num_context_tokens += end
        plan.num_attended_tokens += attended(count, end)
        rows.append((slot, count, request.row_flags if count == wanted else 0))
        budget -= count
    if rows:
        table = np.array(rows, np.int32)
        plan.slots = np.concatenate((plan.slots, table[:, 0].astype(np.intp)))
        plan.num_tokens = np.concatenate((plan.num_tokens, table[:, 1]))
        plan.flags = np.concatenate((plan.flags, table[:, 2].astype(np.uint8)))


def _has_room(state: State, request: Request, num_cached_blocks: int) -> bool:
    """Whether its whole prompt fits beside what running prompts still need, with some headroom:
    more for one that was preempted, so that two requests do not preempt each other in turn."""
    columns, kv = state.columns, state.kv
    running = state.running_slots
    if not len(running):
        return True
    owed = blocks_for(columns.num_tokens[running], kv.block_size) - kv.tables.num_blocks[running]
    need = -(-len(request.tokens) // kv.block_size) - num_cached_blocks
    headroom = 1 + len(running) // 16
    if request.num_preemptions:
        headroom = (1 + min(request.num_preemptions, 8)) * (len(running) + 1)
    return need + int(np.maximum(owed, 0).sum()) + headroom <= kv.num_allocatable
