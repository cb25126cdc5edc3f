"""Whether tokens come when they should, and whose fault it is when they do not.

Pure functions of the group and the plan in flight. A long step is not a fault while its worker's
heartbeats show that it computes.
"""

from __future__ import annotations

from quire_scheduler.group import WORRY_S, Group
from quire_scheduler.plan import Plan

DEADLINE_S = 60.0  # a step may take this long, and DEADLINE_FACTOR times its prediction
DEADLINE_FACTOR = 20.0
DEADLINE_PER_TOKEN_S = 0.1  # while nothing is known about the worker's speed
LOST_PLAN_S = 5.0  # an idle worker that has not run a plan after this does not answer


def patience(plan: Plan) -> float:
    """Seconds a step may take before its worker is given up."""
    if not plan.predicted_s:  # nothing is known
        return DEADLINE_S + DEADLINE_PER_TOKEN_S * plan.total_tokens
    return DEADLINE_S + DEADLINE_FACTOR * plan.predicted_s


def problem(group: Group, plan: Plan | None, now: float) -> str:
    """Why no token would come though `plan`, the oldest in flight, should yield some; '' = fine."""
    for worker in group.silent(now, WORRY_S):
        return f"worker rank {worker.rank} sends no heartbeats"
    if plan is None or now - plan.begins_at <= LOST_PLAN_S:
        return ""
    for worker in list(group.workers.values()):
        if worker.has_heartbeat and not worker.busy_micros and worker.last_seq < plan.seq:
            return f"worker rank {worker.rank} does not run plan {plan.seq}"
    return ""
