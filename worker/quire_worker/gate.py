"""PlanGate: which plans run. Each exactly once, in order of seq within an epoch.

Knows the numbers of plans and what was answered to the last ones; not what plans hold.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from quire.v1 import step_pb2 as pb

log = logging.getLogger("quire.worker")

RESULTS_KEPT = 8  # for plans that arrive twice


class PlanGate:
    """Used by one thread; others may read the numbers, which are plain ints."""

    def __init__(self, worker_epoch: int, begin_epoch: Callable[[], None]) -> None:
        """begin_epoch: empties every slot; called at the first plan of a higher epoch."""
        self.worker_epoch = worker_epoch
        self.epoch = 0  # of the last plan executed
        self.highest_epoch = 0  # seen in any plan
        self.last_seq = 0
        self.broken = ""  # why the rest of the epoch is refused
        self.results: deque[pb.StepResult] = deque(maxlen=RESULTS_KEPT)
        self._begin_epoch = begin_epoch

    def check(self, plan: pb.StepPlan) -> pb.StepResult | None:
        """The answer to a plan that is not to be executed. None: execute it, then call done()."""
        epoch, seq = plan.epoch, plan.seq
        self.highest_epoch = max(self.highest_epoch, epoch)
        if epoch < self.epoch or epoch == 0:
            return self._refused(plan, f"epoch {epoch} is over; this worker is in {self.epoch}.")
        if epoch > self.epoch:
            if seq != 1:
                return self._refused(plan, f"epoch {epoch} begins with plan {seq}, not 1.")
            self.epoch, self.last_seq, self.broken = epoch, 0, ""
            self.results.clear()
            self._begin_epoch()
            return None
        if seq <= self.last_seq:
            for result in self.results:
                if result.seq == seq:
                    return result
            return self._refused(plan, f"plan {seq} was executed long ago; its result is gone.")
        if not self.broken and seq != self.last_seq + 1:
            self.broken = f"plan {self.last_seq + 1} is missing: {seq} came after {self.last_seq}."
            log.error("epoch %d: %s", epoch, self.broken)
        return self._refused(plan, self.broken) if self.broken else None

    def done(self, result: pb.StepResult) -> None:
        """The plan was executed, or failed: then the epoch is over here."""
        self.last_seq = result.seq
        if result.status == pb.STEP_STATUS_FAILED:
            self.broken = f"plan {result.seq} failed: {result.error}"
        self.results.append(result)

    def answer(self, plan: pb.StepPlan, status: pb.StepStatus, error: str = "") -> pb.StepResult:
        """A result with nothing but its numbers."""
        return pb.StepResult(
            epoch=plan.epoch,
            seq=plan.seq,
            worker_epoch=self.worker_epoch,
            status=status,
            error=error,
        )

    def _refused(self, plan: pb.StepPlan, reason: str) -> pb.StepResult:
        return self.answer(plan, pb.STEP_STATUS_REFUSED, reason)
