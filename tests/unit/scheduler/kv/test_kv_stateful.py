"""KVManager against a simulated worker: whatever happens in whatever order, a hit is never wrong.

The worker executes plans in order, may fail in the middle of one, and dies or outlives schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_builders import BLOCK, IDENTITY, Clock

from quire_scheduler.kv import HostTier, KVHandle, KVManager, Namespace, Order
from quire_scheduler.kv.names import chain, root_of

NUM_BLOCKS = 14
Content = tuple[Namespace, tuple[int, ...]]  # all tokens from position 0 to the block's end
GARBAGE: Content = (Namespace(b"garbage"), ())
# Prompts are made of few different blocks, so that prefixes meet, and a tail.
PROMPTS = st.builds(
    lambda blocks, tail: [token for block in blocks for token in [block] * BLOCK] + tail,
    st.lists(st.sampled_from([0, 0, 0, 1]), max_size=5),
    st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK + 1),
)
OUTPUTS = st.integers(1, 10).map(lambda n: [0] * n)
SPACES = (Namespace(), Namespace(salt=b"t"))


@cache
def name_of(content: Content) -> bytes:
    namespace, tokens = content
    names = chain(root_of(IDENTITY, namespace, BLOCK), np.array(tokens, np.int32), BLOCK)
    return names[-16:]


@dataclass
class Memory:
    """Blocks' bytes and names, as they are or as they will be when all plans have run."""

    content: dict[int, Content] = field(default_factory=dict)
    names: dict[int, bytes] = field(default_factory=dict)
    host: dict[int, Content] = field(default_factory=dict)
    host_names: dict[int, bytes] = field(default_factory=dict)

    def hand_out(self, block: int) -> None:
        self.content.pop(block, None)
        self.names.pop(block, None)


@dataclass(eq=False)
class Running:
    namespace: Namespace
    tokens: list[int]  # forced ones, then those the model is going to yield; ends with EOS
    num_forced: int
    handle: KVHandle
    num_computed: int  # by plans built
    num_confirmed: int  # tokens known here


@dataclass
class Plan:
    seq: int
    new_blocks: list[int] = field(default_factory=list)
    writes: list[tuple[int, Content]] = field(default_factory=list)
    named: list[tuple[int, bytes]] = field(default_factory=list)
    rows: list[tuple[Running, int]] = field(default_factory=list)  # tokens confirmed by the result
    copies: list[Order] = field(default_factory=list)

    def execute(self, memory: Memory, failing: bool = False) -> None:
        for order in self.copies:
            for src, dst, name in zip(order.src, order.dst, order.names, strict=True):
                if order.is_load:
                    assert memory.host_names[src] == name
                    memory.content[dst], memory.names[dst] = memory.host[src], name
                else:
                    assert name_of(memory.content[src]) == name
                    memory.host[dst], memory.host_names[dst] = memory.content[src], name
        for block in self.new_blocks:
            memory.hand_out(block)
        memory.names.update(self.named)
        memory.content.update((b, GARBAGE if failing else c) for b, c in self.writes)


class KVMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["lru", "lfu", "fifo"]),
        num_host_blocks=st.sampled_from([0, 1, 3, 10, 40]),
        copy_s=st.sampled_from([0.001, 0.2]),
    )
    def start(self, policy: str, num_host_blocks: int, copy_s: float) -> None:
        self.policy = policy
        self.num_host_blocks, self.copy_s = num_host_blocks, copy_s
        self.worker = Memory()
        self.history: list[tuple[Namespace, list[int]]] = []
        self.new_scheduler()

    def new_scheduler(self) -> None:
        self.kv = KVManager(NUM_BLOCKS, BLOCK, IDENTITY, eviction_policy=self.policy, clock=Clock())
        if self.num_host_blocks:
            # Deep blocks are worth a copy, the first ones not always.
            self.kv.host = HostTier(
                self.num_host_blocks,
                BLOCK,
                self.copy_s,
                lambda first, n: n * (0.01 + first),
                Clock(),
            )
            self.kv.host.limit_s = 1.0
        self.new_epoch()

    def new_epoch(self) -> None:
        self.future = Memory(dict(self.worker.content), dict(self.worker.names))
        self.running: list[Running] = []
        self.sent: list[Plan] = []  # not executed yet
        self.executed: list[Plan] = []  # result on its way
        self.plan = Plan(1)
        self.fences: dict[int, int] = dict.fromkeys(getattr(self, "fences", {}), 1)

    # -- requests

    def admit(self, namespace: Namespace, forced: list[int], outputs: list[int]) -> None:
        tokens = np.array(forced, np.int32)
        expected = self.cached_prefix(namespace, forced)
        assert self.kv.peek_prefix(tokens, namespace) == expected
        num_cached, handle = self.kv.match_prefix(tokens, namespace)
        assert expected <= num_cached < max(1, len(forced))
        for i, block in enumerate(handle.block_ids.tolist()):
            assert self.future.content[block] == (namespace, tuple(forced[: (i + 1) * BLOCK]))
        num_matched = handle.num_blocks
        complete = self.kv.load_prefix(handle, tokens, self.plan.seq)
        num_cached = handle.num_cached_tokens
        assert num_cached == handle.num_blocks * BLOCK < max(1, len(forced))
        loads = {}
        for order in self.kv.host.orders if self.kv.host is not None else ():
            if order.is_load:
                loads.update(zip(order.dst, order.names, strict=True))
        for i, block in enumerate(handle.block_ids.tolist()[num_matched:], num_matched):
            content = (namespace, tuple(forced[: (i + 1) * BLOCK]))
            if loads.get(block) == name_of(content):
                self.future.content[block] = content  # verified when the plan is executed
                self.future.names[block] = name_of(content)
            assert self.future.content[block] == content
        if not complete:
            self.kv.release(handle)
            return
        request = Running(namespace, forced + outputs, len(forced), handle, num_cached, len(forced))
        if self.grow(request, len(forced)):
            self.running.append(request)
        else:
            self.kv.release(handle)

    def cached_prefix(self, namespace: Namespace, tokens: list[int]) -> int:
        """Recomputed from the tree's nodes, without matching."""
        prefixes = set()
        for node in self.kv.tree.nodes():
            key, root = b"", node
            while root.parent is not None:
                key, root = root.key + key, root.parent
            if root.namespace == namespace:
                prefixes.add(np.frombuffer(key, np.int32).tobytes())
        limit = max(0, len(tokens) - 1) // BLOCK
        whole = np.array(tokens, np.int32).tobytes()
        step = 4 * BLOCK
        return BLOCK * max(
            (
                n
                for n in range(limit + 1)
                if any(p[: n * step] == whole[: n * step] and len(p) >= n * step for p in prefixes)
            ),
            default=0,
        )

    def grow(self, request: Running, num_tokens: int) -> bool:
        need = -(-num_tokens // BLOCK) - request.handle.num_blocks
        if need <= 0:
            return True
        free_before = self.kv.num_allocatable
        ids = self.kv.allocate_for(request.handle, need)
        assert (ids is not None) == (need <= free_before)
        if ids is None:
            return False
        for block in ids.tolist():
            assert block not in self.fences, "a fenced block was handed out"
            self.future.hand_out(block)
            self.plan.new_blocks.append(block)
        return True

    @rule(
        namespace=st.sampled_from((*SPACES, SPACES[0], SPACES[0])),
        forced=PROMPTS,
        outputs=OUTPUTS,
    )
    def new_request(self, namespace: Namespace, forced: list[int], outputs: list[int]) -> None:
        self.admit(namespace, forced, outputs)

    @precondition(lambda self: self.history)
    @rule(pick=st.integers(0, 99), more=st.sampled_from([[], [0], [0] * 4, [1]]), outputs=OUTPUTS)
    def next_turn(self, pick: int, more: list[int], outputs: list[int]) -> None:
        """A conversation goes on, or a preempted request comes back."""
        namespace, tokens = self.history[pick % len(self.history)]
        self.admit(namespace, tokens + more, outputs)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 99), chunk=st.integers(1, 12))
    def compute(self, pick: int, chunk: int) -> None:
        self.add_row(self.running[pick % len(self.running)], chunk)

    def add_row(self, request: Running, chunk: int) -> None:
        """A row in the plan being built: a chunk of forced tokens, or one decoded token."""
        if any(request is row for row, _ in self.plan.rows):
            return
        start = request.num_computed
        decoding = start >= request.num_forced
        end = start + 1 if decoding else min(start + chunk, request.num_forced)
        if end > len(request.tokens) or not self.grow(request, end):
            return
        table = request.handle.block_ids.tolist()
        written = min(end, len(request.tokens) - 1) if decoding else end  # EOS rows are skipped
        for block in range(start // BLOCK, -(-written // BLOCK)):
            tokens = tuple(request.tokens[: min((block + 1) * BLOCK, written)])
            self.plan.writes.append((table[block], (request.namespace, tokens)))
            self.future.content[table[block]] = (request.namespace, tokens)
        request.num_computed = end
        if not decoding:
            known = np.array(request.tokens[:end], np.int32)
            self.kv.publish(request.handle, known, self.plan.seq)
        yields = end >= request.num_forced
        confirmed = min(end + 1, len(request.tokens)) if yields else request.num_forced
        self.plan.rows.append((request, confirmed))

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 99), fence=st.booleans())
    def release(self, pick: int, fence: bool) -> None:
        """Finish, cancel or preempt. Nobody goes who got blocks in the plan being built: a plan is
        built in one go, and copies run before its rows."""
        request = self.running.pop(pick % len(self.running))
        if set(request.handle.block_ids.tolist()) & set(self.plan.new_blocks):
            self.send()
        self.plan.rows = [row for row in self.plan.rows if row[0] is not request]
        self.history.append((request.namespace, request.tokens[: request.num_confirmed]))
        held = [*request.handle.block_ids.tolist(), *request.handle.shared.tolist()]
        self.kv.release(request.handle, fence_seq=self.plan.seq if fence else 0)
        if fence:
            self.fences.update((block, self.plan.seq) for block in held)

    # -- plans

    @rule(prepare=st.booleans())
    def send(self, prepare: bool = True) -> None:
        if prepare:
            self.kv.prepare_names()
        ids, names = self.kv.take_named(self.plan.seq)
        assert len(names) == 16 * len(ids)
        for i, block in enumerate(ids.tolist()):
            name = names[16 * i : 16 * i + 16]
            assert name == name_of(self.future.content[block])
            self.plan.named.append((block, name))
        self.future.names.update(self.plan.named)
        if self.kv.host is not None:
            self.plan.copies = self.kv.host.take(self.plan.seq)
        self.sent.append(self.plan)
        self.plan = Plan(self.plan.seq + 1)

    @precondition(lambda self: self.sent)
    @rule()
    def execute(self) -> None:
        plan = self.sent.pop(0)
        plan.execute(self.worker)
        self.executed.append(plan)

    @precondition(lambda self: self.executed)
    @rule(together=st.booleans())
    def receive_result(self, together: bool = True) -> None:
        plan = self.executed.pop(0)
        self.kv.acknowledge(plan.seq)
        self.fences = {block: seq for block, seq in self.fences.items() if seq > plan.seq}
        full: dict[int, int] = {}  # blocks by row
        matrix = np.zeros((self.kv.tables.ids.shape[0], NUM_BLOCKS, BLOCK), np.int32)
        for request, confirmed in plan.rows:
            request.num_confirmed = max(request.num_confirmed, confirmed)
            if request.handle.live and confirmed > request.num_forced:
                known = np.array(request.tokens[: confirmed - 1], np.int32)
                if not together:
                    self.kv.publish(request.handle, known, plan.seq)
                elif len(known) // BLOCK > request.handle.num_published:
                    row = request.handle.row
                    full[row] = len(known) // BLOCK
                    matrix[row].reshape(-1)[: len(known)] = known
        if together:
            rows = np.array(sorted(full), np.intp)
            counts = np.array([full[row] for row in rows.tolist()], np.int32)
            self.kv.publish_many(rows, counts, matrix, plan.seq)

    @rule(
        chunk=st.sampled_from([1, 3, 4, 20]),
        steps=st.integers(1, 5),
        unexecuted=st.integers(0, 2),
        unanswered=st.integers(0, 1),
        together=st.booleans(),
    )
    def go_on(
        self, chunk: int, steps: int, unexecuted: int, unanswered: int, together: bool
    ) -> None:
        """Several whole steps, the worker and its results up to so many plans behind."""
        for _ in range(steps):
            for request in self.running:
                self.add_row(request, chunk)
            self.send()
            while len(self.sent) > unexecuted:
                self.execute()
            while len(self.executed) > unanswered:
                self.receive_result(together)

    # -- what goes wrong, now and then

    @precondition(lambda self: self.plan.seq > 3)
    @rule(failing=st.booleans())
    def step_fails(self, failing: bool) -> None:
        """A gap, or a plan that fails in the middle: same worker, new epoch."""
        if failing:
            for request in self.running:
                self.add_row(request, 8)
            self.send()
            self.sent[0].execute(self.worker, failing=True)
        self.give_up_running()
        self.kv.reset_unacknowledged()
        self.new_epoch()
        self.adopt()

    @precondition(lambda self: self.plan.seq > 6)
    @rule()
    def scheduler_restarts(self) -> None:
        for plan in self.sent:
            plan.execute(self.worker)
        self.give_up_running()
        self.fences = {}
        self.new_scheduler()
        self.adopt()

    @precondition(lambda self: self.plan.seq > 9)
    @rule()
    def worker_dies(self) -> None:
        self.worker = Memory()
        self.give_up_running()
        self.fences = {}
        self.kv.reset_all()
        self.new_epoch()

    def give_up_running(self) -> None:
        self.history += [(r.namespace, r.tokens[: r.num_confirmed]) for r in self.running]

    def adopt(self) -> None:
        names = self.worker.names
        self.kv.adopt_inventory(np.array(list(names), np.int32), b"".join(names.values()))
        if self.kv.host is not None:
            held = self.worker.host_names
            self.kv.host.adopt(np.array(list(held), np.int32), b"".join(held.values()))

    # -- always

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check()

    @invariant()
    def worker_names_tell_the_truth(self) -> None:
        if hasattr(self, "worker"):
            for block, name in self.worker.names.items():
                assert name == name_of(self.worker.content[block])
            for block, name in self.worker.host_names.items():
                assert name == name_of(self.worker.host[block])

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for request in self.running:
            self.kv.release(request.handle)
        self.kv.acknowledge(self.plan.seq)
        self.kv.check()
        assert self.kv.num_used == self.kv.num_fenced == 0
        _, handle = self.kv.match_prefix(np.array([7], np.int32), SPACES[0])
        assert self.kv.allocate_for(handle, self.kv.num_usable) is not None


TestKV = KVMachine.TestCase
TestKV.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
