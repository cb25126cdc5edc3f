"""Driver: keeps the worker group fed. Sends plans, applies results, starts a new epoch when
anything goes wrong.

Knows frames, time and the group; not clients, threads or submissions. What clients are to hear
goes to the outbox.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.link import SchedulerLink
from quire.v1 import step_pb2
from quire_scheduler import health, results
from quire_scheduler.admission import ModelInfo
from quire_scheduler.columns import Columns
from quire_scheduler.counters import Counters
from quire_scheduler.group import Group, Worker
from quire_scheduler.journal import Journal
from quire_scheduler.memory import describe
from quire_scheduler.opening import opening
from quire_scheduler.outbox import Outbox
from quire_scheduler.pace import Pacer
from quire_scheduler.plan import Plan
from quire_scheduler.preemption import Victim
from quire_scheduler.request import Request
from quire_scheduler.schedule import preempt, publish_outputs, schedule
from quire_scheduler.segment import Direction
from quire_scheduler.state import State
from quire_scheduler.words import Words

log = logging.getLogger("quire.scheduler")

HEARTBEAT_S = 1.0
PROBE_AGAIN_S = 0.05
IDLE_S = 1.0
MAX_BARREN_EPOCHS = 8  # without a finished step, before requests are blamed for it


class Driver:
    """One worker group's feed. Single-threaded; `problem` and the numbers may be read from any."""

    def __init__(
        self,
        config: EngineConfig,
        link: SchedulerLink,
        clock: Callable[[], float],
        counters: Counters,
        journal: Journal | None,
    ) -> None:
        self.config = config
        self.group = Group(config.block_size)
        self.pacer = Pacer(config, counters)
        self.outbox = Outbox(counters)
        self.state: State | None = None
        self.model: ModelInfo | None = None
        self.epoch = 0
        self.seq = 0
        self.ready = False  # plans may be sent
        self.trouble = ""  # the last loss, until a group is complete again
        self._words = Words(link)
        self._link, self._clock, self._counters, self._journal = link, clock, counters, journal
        self._memory: tuple[int, ...] = ()  # incarnation that the block books describe
        self._barren = 0
        self._beat_at = 0.0

    # -- requests ---------------------------------------------------------------------------
    def add(self, request: Request) -> None:
        """A new request waits. One that has died elsewhere is a suspect."""
        assert self.state is not None
        if request.deaths:
            request.blamed_at = request.num_tokens
            self.state.probation.add([request])
        else:
            self.state.waiting.push(request)

    def cancel(self, request: Request) -> None:
        if not request.finished and self.state is not None:
            self.state.finish(request)
            self.outbox.cancelled(request)

    def _fail(self, request: Request, error: QuireError) -> None:
        assert self.state is not None
        self.state.finish(request)
        self.outbox.failed(request, error)

    # -- plans ------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        return self.state is not None and bool(self.state.in_flight)

    @property
    def _has_work(self) -> bool:
        state = self.state
        return state is not None and bool(state.num_running or state.num_waiting or state.to_retire)

    def due(self, now: float) -> bool:
        """Whether a plan may leave now. With one in flight only just in time, so that a newcomer
        does not wait for two steps; at most two (and one per further pipeline stage)."""
        if not self.ready or not self._has_work:
            return False
        assert self.state is not None and self.group.layout is not None
        in_flight = self.state.in_flight
        if not in_flight:
            return True
        if self.state.probation.suspects:
            return False  # with one plan at a time it is known who was computing
        if self._journal is not None and self._journal.full:
            return False  # its next segment begins when nothing is in flight
        if len(in_flight) >= self.group.layout.pp_size + 1:
            return False
        return self.pacer.until_lead(in_flight[-1], now) <= 0

    def next_due(self, now: float) -> float:
        """Seconds until something is to be done without a frame coming in."""
        wait = IDLE_S
        state = self.state
        if self.ready and state is not None and state.in_flight and self._has_work:
            assert self.group.layout is not None
            rest = self.pacer.until_lead(state.in_flight[-1], now)
            if rest > 0 and len(state.in_flight) < self.group.layout.pp_size + 1:
                wait = min(wait, rest)
        elif self.ready and self._has_work:
            wait = 0.0
        return min(wait, max(self._beat_at - now, 0.0))

    def send_plan(self) -> bool:
        """Decide on the next step and send it. False when there is nothing to send."""
        state = self.state
        assert state is not None
        if self._journal is not None and self._journal.full:
            return self._open_segment(state, self._journal)
        started = time.perf_counter()
        state.requeue(state.probation.advance())
        plan = schedule(state, self.pacer.limits, self.epoch, self.seq + 1)
        if plan is None:
            return self._unblock()
        self.seq += 1
        return self._send_plan(state, plan, started)

    def _send_plan(self, state: State, plan: Plan, started: float) -> bool:
        """The plan, the last one in flight, to every rank. started: performance counter when its
        making began. False when a rank can't be reached."""
        now = self._clock()
        self.pacer.sent(plan, state.in_flight[:-1], now)
        deadline = plan.begins_at - now + health.patience(plan)
        frame = plan.frame(now, min(int(deadline * 1e3), 1 << 31)).SerializeToString()
        if self._journal is not None:
            self._journal.append(Direction.PLAN, frame, now)
        plan.ranks = set(self.group.workers)
        lost = [w for w in self.group.workers.values() if not self._link.send(w.peer, frame)]
        self._counters.plan_time.observe(time.perf_counter() - started)
        for worker in lost:
            self._lose(worker, "can't be reached")
        return not lost

    def _open_segment(self, state: State, journal: Journal) -> bool:
        """A segment of the journal is replayed by itself: it begins with an epoch of its own."""
        started = time.perf_counter()
        self.epoch += 1
        self.seq = 0
        self._counters.epochs += 1
        journal.rotate(worker.hello for worker in self.group.workers.values())
        for plan in opening(state, self.epoch):
            self.seq = plan.seq
            if not self._send_plan(state, plan, started):
                return False
        journal.opened()
        return True

    def _unblock(self) -> bool:
        """Nothing can run though requests wait: make room, so that nobody waits for ever."""
        state = self.state
        assert state is not None
        if state.in_flight or not state.num_waiting:
            return False
        if state.num_running:  # set aside for those on probation, whom they leave no room
            preempt(state, Victim(state.last_started.slot, offload=False), self.seq + 1)
            return True
        head = state.queue.first(1)
        if head:
            message = "The request does not fit the KV memory, though nothing else runs."
            self._fail(head[0], QuireError("internal_error", message))
            return True
        return False

    def deferred(self) -> None:
        """Book-keeping that can be done while the worker computes."""
        if self.state is not None and self.state.in_flight:
            publish_outputs(self.state, self.seq)
        self.pacer.learn()

    # -- frames -----------------------------------------------------------------------------
    def on_hello(self, peer: bytes, hello: step_pb2.Hello, now: float) -> bool:
        """A worker introduces itself. True when the group is complete with it."""
        reason = self.group.refusal(hello)
        if reason:
            log.error("refused worker rank %d: %s", hello.rank, reason)
            self._counters.drop("refused")
            self._words.refuse(peer, reason)
            return False
        old = self.group.workers.get(hello.rank)
        same = old is not None and old.hello.worker_epoch == hello.worker_epoch
        if same and self.ready and old is not None and old.peer == peer and self.seq == 0:
            self._words.welcome(peer, self.epoch)  # it said Hello twice before it was answered
            return False
        if old is not None and not same:
            self._counters.worker_losses += 1
            log.warning("worker rank %d was replaced by a new process", hello.rank)
        self._halt(blame=old is not None and not same)
        self.group.join(peer, hello, now)
        log.info("worker rank %d: %s on %s", hello.rank, hello.model, hello.device)
        if not self.group.complete:
            return False
        self._begin()
        return True

    def on_answer(
        self, peer: bytes, answer: step_pb2.StepResult | step_pb2.Ack, now: float
    ) -> None:
        """A rank has done with a plan: the last stage's rank 0 sends the result, others an Ack.
        The result counts when all of them have answered."""
        worker, state = self.group.by_peer(peer), self.state
        if worker is None or state is None or worker.hello.worker_epoch != answer.worker_epoch:
            self._counters.drop("unknown peer")
            return
        worker.last_heard = now
        result = answer if isinstance(answer, step_pb2.StepResult) else None
        if result is not None:
            worker.memory_bytes = result.device_memory_bytes
        if answer.epoch != self.epoch:
            self._counters.drop("stale")
        elif (result is not None) != (worker.rank == self.group.result_rank):
            self._counters.drop("wrong rank")
        elif answer.status == step_pb2.STEP_STATUS_FAILED:
            log.error("rank %d: plan %d failed: %s", worker.rank, answer.seq, answer.error)
            self._counters.failed_steps += 1
            self._restart(blame=True, seq=answer.seq)
        else:
            awaited = [p for p in state.in_flight if worker.rank in p.ranks]
            if not awaited or answer.seq < awaited[0].seq:
                self._counters.drop("duplicate")
            elif answer.status != step_pb2.STEP_STATUS_OK or answer.seq != awaited[0].seq:
                seq, why = awaited[0].seq, answer.error
                log.error("rank %d: plan %d was not run: %s", worker.rank, seq, why)
                self._restart(blame=False)
            else:
                awaited[0].ranks.discard(worker.rank)
                awaited[0].result = result or awaited[0].result
                self._apply_answered(state, now)

    def _apply_answered(self, state: State, now: float) -> None:
        while state.in_flight and not state.in_flight[0].ranks:
            plan = state.in_flight[0]
            result = plan.result
            assert self.model is not None and result is not None
            try:
                applied = results.apply(state, plan, result, self.model.vocab_size)
            except results.ResultError as wrong:
                log.error("plan %d: %s", plan.seq, wrong)
                self._counters.drop("contradiction")
                self._restart(blame=False)
                return
            for request, error in applied.failed:
                self._fail(request, error)
            if applied.doubtful:
                self._restart(blame=False)
                return
            self._barren = 0
            self.outbox.put(applied.outputs)
            for request, reason in applied.ended:
                self.outbox.ended(request, reason)
            following = state.in_flight[0] if state.in_flight else None
            self.pacer.answered(plan, result.timings, following, now)
            if plan.copies and state.kv.host is not None:
                state.kv.host.observe(plan.num_copied_blocks, result.timings.copy_micros * 1e-6)
            self._counters.output_tokens += applied.num_tokens

    def on_heartbeat(self, peer: bytes, beat: step_pb2.Heartbeat, now: float) -> None:
        worker = self.group.by_peer(peer)
        if worker is None:
            # One that was given up, perhaps because it stood still: it is to say Hello.
            self._counters.drop("unknown peer")
            self._words.ask_who(peer)
            return
        worker.last_heard = now
        worker.has_heartbeat = True
        worker.busy_micros = beat.busy_micros
        worker.last_seq = beat.last_seq if beat.epoch == self.epoch else 0
        if beat.metrics:
            worker.metrics = beat.metrics

    def probe(self, peer: bytes) -> None:
        """The link saw a connection go: is it this worker's?"""
        worker = self.group.by_peer(peer)
        if worker is not None and not self._beat(worker):
            self._lose(worker, "closed its connection")
        else:  # the event may be ahead of what a send sees
            self._beat_at = min(self._beat_at, self._clock() + PROBE_AGAIN_S)

    # -- when something dies ----------------------------------------------------------------
    def watch(self, now: float) -> None:
        """Heartbeats out; silent and overdue workers are lost."""
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_S
            for worker in list(self.group.workers.values()):
                if not self._beat(worker):
                    self._lose(worker, "can't be reached")
        for worker in self.group.silent(now):
            self._lose(worker, f"was silent for {now - worker.last_heard:.1f} s")
        if self.ready and self.busy:
            assert self.state is not None
            plan = self.state.in_flight[0]
            if now - plan.begins_at > health.patience(plan):
                worker = self.group.workers[self.group.result_rank]
                self._lose(worker, f"has not answered plan {plan.seq} before its deadline")

    def problem(self, now: float) -> str:
        """Why no token would come though one should; '' when all is well."""
        if not self.ready:
            return self.trouble or self.group.missing() or "waiting for a worker"
        state = self.state
        in_flight = list(state.in_flight) if state is not None else []
        return health.problem(self.group, in_flight[0] if in_flight else None, now)

    def _lose(self, worker: Worker, why: str) -> None:
        log.error("worker rank %d %s", worker.rank, why)
        self._counters.worker_losses += 1
        self.trouble = f"worker rank {worker.rank} {why}"
        self._halt(blame=True)
        self.group.leave(worker.peer)
        self.ready = False

    def _restart(self, *, blame: bool, seq: int = 0) -> None:
        """A new epoch with the workers that are there."""
        self._barren += 1
        self._halt(blame=blame or self._barren > MAX_BARREN_EPOCHS, seq=seq)
        if self.group.complete:
            self._begin()

    def _halt(self, *, blame: bool, seq: int = 0) -> None:
        """End the epoch: live requests wait with prompt and confirmed tokens as forced prefix.
        blame: those computing in plan `seq` are suspects; by default in any plan in flight, for the
        answer to the oldest may have been lost with a worker that died of the next."""
        self.ready = False
        state = self.state
        if state is None:
            return
        failing = [p for p in state.in_flight if p.seq == seq] or state.in_flight
        computing = state.computing(failing) if blame else []
        stopped = state.restart()
        culprit = state.probation.blame(computing) if computing else None
        for request in computing:
            state.waiting.discard(request)
        if culprit is not None:
            message = (
                f"The request was alone in the step when the worker failed, {culprit.deaths} "
                "failures in all. It is not tried again."
            )
            self._fail(culprit, QuireError("request_crashed_worker", message))
        suspects = set(computing)
        state.requeue([r for r in stopped if r not in suspects and not state.probation.holds(r)])

    def _begin(self) -> None:
        """A complete group: memory, limits and a new epoch above all that any worker has seen."""
        group = self.group
        self.epoch = 1 + max(self.epoch, group.highest_epoch)
        self.seq = 0
        self._counters.epochs += 1
        if group.incarnation != self._memory or self.state is None:
            self._open_memory()
        self.ready = True
        self.trouble = ""
        for worker in list(group.workers.values()):
            self._words.welcome(worker.peer, self.epoch)

    def _open_memory(self) -> None:
        """The workers' memory is another than the books describe."""
        old = self.state
        memory = describe(self.group, self.config, old.kv if old is not None else None)
        model = self.model = memory.model
        self._memory = memory.incarnation
        self.pacer.measure(memory.cost, memory.limits)
        columns = old.columns if old is not None else None
        size = (model.max_slots, model.max_model_len, model.block_size)
        if columns is None or columns.size != size:
            columns = Columns(*size)
        if old is None:
            self.state = State(columns, memory.kv, self.config.scheduling_policy)
            self.state.cost = memory.cost
        else:
            old.columns, old.kv, old.cost = columns, memory.kv, memory.cost
            for request in old.shorten(model.max_model_len):
                self.outbox.cut(request)
        log.info(
            "ready: %s, %d blocks of %d tokens, context %d, %d tokens a step, %d blocks still held",
            model.model, model.num_blocks, model.block_size, model.max_model_len,
            self.pacer.limits.max_num_batched_tokens, memory.num_adopted,
        )  # fmt: skip

    def _beat(self, worker: Worker) -> bool:
        return self._words.beat(worker.peer, self.epoch, self.seq)
