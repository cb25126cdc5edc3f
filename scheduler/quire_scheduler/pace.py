"""When the next plan leaves, and where the time of a step goes.

Knows predicted and measured times; not what a plan holds beyond its size. The second plan leaves
just in time: early enough that the worker never waits, late enough that a newcomer does not wait
for two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quire.config import EngineConfig
from quire.step_cost import DEFAULT_TOKENS, StepCostModel, StepSize
from quire.v1 import step_pb2
from quire_scheduler.counters import Counters
from quire_scheduler.plan import Plan
from quire_scheduler.shares import Limits

LEAD_S = 0.002  # the next plan leaves at least this long before the running step should end
ROUND_TRIPS = 3  # or so many round trips, if that is longer
SMOOTHING = 0.1
TARGET_SHARE = 0.8  # of --itl-target-ms, for the step; then the way to the client, and surprise
COPY_SHARE = 0.1  # of --itl-target-ms, for copies between the tiers
STEP_MULTIPLE = 16  # tokens; also the least that a prompt gets
MAX_CHUNK = 1 << 16
MAX_ROUND_TRIP_S = 0.005  # one slow answer must not bring the plans forward for long


class Pacer:
    """All times in seconds on the engine's clock."""

    def __init__(self, config: EngineConfig, counters: Counters) -> None:
        self._target_s = config.itl_target_ms / 1e3
        self._follows = not config.max_num_batched_tokens  # the budget is what steps really cost
        self.cost = StepCostModel()
        self.limits = Limits(DEFAULT_TOKENS, config.max_num_seqs)
        self.round_trip = 0.0005  # scheduler -> worker -> scheduler, without the step
        self._counters = counters
        self._answered: list[tuple[Plan, step_pb2.StepTimings, float]] = []  # to learn from

    def measure(self, cost: StepCostModel, limits: Limits) -> None:
        """Other workers: `cost` is what they take, `limits` what their plans may hold."""
        self.cost, self.limits = cost, limits
        if self._target_s:
            copy_s = min(limits.copy_s, self._target_s * COPY_SHARE)
            self.limits = replace(limits, prompt_tokens=self._prompt_tokens, copy_s=copy_s)

    def until_lead(self, running: Plan, now: float) -> float:
        """How long until the plan after `running` should leave; <= 0 = now."""
        rest = running.begins_at + running.predicted_s - now
        return rest - max(LEAD_S, ROUND_TRIPS * self.round_trip)

    def _prompt_tokens(self, decoding: StepSize, start: int) -> int:
        """Tokens that a prompt, from `start` on, may have beside the rows that decode, if the step
        is to keep the target, by how far such steps lately strayed; at least STEP_MULTIPLE: a
        prompt gets on even where decoding alone takes longer."""
        cost, target_s = self.cost, self._target_s * TARGET_SHARE
        if not cost.known:
            return STEP_MULTIPLE
        chunk = cost.largest_chunk(decoding, start, target_s, MAX_CHUNK)
        target_s /= 1 + cost.stray(decoding.num_tokens + chunk)
        chunk = cost.largest_chunk(decoding, start, target_s, chunk)
        # Few sizes of steps: kernels are compiled for each, and what one took tells of the next.
        rows = decoding.num_tokens
        return max(STEP_MULTIPLE, (rows + chunk) // STEP_MULTIPLE * STEP_MULTIPLE - rows)

    def sent(self, plan: Plan, ahead: Sequence[Plan], now: float) -> None:
        """The plan leaves, behind those `ahead` that are not answered."""
        plan.predicted_s = plan.copies_s + self.cost.predict(plan.size)
        plan.sent_at = plan.begins_at = now
        if ahead:
            plan.begins_at = max(now, ahead[-1].begins_at + ahead[-1].predicted_s)
        self._counters.scheduled_tokens += plan.total_tokens
        for request, _ in plan.admitted:
            if not request.resumed:
                self._counters.queue_time.observe(now - request.arrived_at)
                request.span.set(quire__queue_ms=(now - request.arrived_at) * 1e3)

    def answered(
        self, plan: Plan, timings: step_pb2.StepTimings, following: Plan | None, now: float
    ) -> None:
        """The plan's result is here."""
        step = timings.prepare_micros + timings.forward_micros + timings.sample_micros
        wire = now - plan.sent_at - (timings.queue_micros + timings.copy_micros + step) * 1e-6
        if wire > 0 and plan.begins_at == plan.sent_at:  # it did not wait for another step
            self.round_trip += SMOOTHING * (min(wire, MAX_ROUND_TRIP_S) - self.round_trip)
        if following is not None:
            following.begins_at = max(now - self.round_trip / 2, following.sent_at)
        self._answered.append((plan, timings, wire))

    def learn(self) -> None:
        """Take the answers since the last call into the cost model and the counters: deferred
        work."""
        for plan, timings, wire in self._answered:
            self._count(plan, timings, wire)
        self._answered.clear()
        self.cost.refit()
        budget = self.cost.default_budget
        if self._follows and budget != self.limits.max_num_batched_tokens:
            self.limits = replace(self.limits, max_num_batched_tokens=budget)

    def _count(self, plan: Plan, timings: step_pb2.StepTimings, wire: float) -> None:
        counters, total = self._counters, plan.total_tokens
        step = timings.prepare_micros + timings.forward_micros + timings.sample_micros
        if total:
            self.cost.observe(plan.size, step)
            decode = int(np.count_nonzero(plan.num_tokens == 1))
            counters.batch_size.observe(len(plan.slots))
            counters.decode_tokens.observe(decode)
            counters.prefill_tokens.observe(total - decode)
            counters.prompt_tokens += total - decode
        counters.steps += 1
        counters.wire_time.observe(max(wire, 0.0))
        counters.worker_queue_time.observe(timings.queue_micros * 1e-6)
        counters.prepare_time.observe(timings.prepare_micros * 1e-6)
        if plan.copies:
            counters.copy_time.observe(timings.copy_micros * 1e-6)
        counters.forward_time.observe(timings.forward_micros * 1e-6)
        counters.sample_time.observe(timings.sample_micros * 1e-6)
        counters.idle_time.observe(timings.idle_micros * 1e-6)
        counters.step_time.observe(step * 1e-6)
