"""The worker group: who is there, whether they fit together, who is silent.

A group is the ranks that work on the same step. Knows no request and no block; sends nothing.
All times are the engine's clock in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from quire.step_cost import Point, StepSize
from quire.v1 import step_pb2
from quire.wire import NAME_BYTES, PROTOCOL_VERSION
from quire_scheduler.columns import I32

SILENCE_S = 3.0  # a worker that has sent heartbeats and stops is lost after this
WORRY_S = 2.0  # and named in the health report after this
MAX_SLOTS = 1 << 16
MAX_MODEL_LEN = 1 << 24
MAX_BLOCKS = 1 << 30
MAX_VOCAB = 1 << 24


@dataclass(frozen=True, slots=True)
class Layout:
    """What all workers of the group, now and later, must have in common."""

    model: str
    model_digest: str
    dtype: str
    kv_dtype: str
    block_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tp_size: int
    pp_size: int

    @staticmethod
    def of(hello: step_pb2.Hello) -> Layout:
        return Layout(
            hello.model,
            hello.model_digest,
            hello.dtype,
            hello.kv_dtype,
            hello.block_size,
            hello.vocab_size,
            tuple(hello.eos_token_ids),
            max(hello.tp_size, 1),
            max(hello.pp_size, 1),
        )


@dataclass(slots=True, eq=False)
class Worker:
    """One rank that said Hello."""

    peer: bytes
    hello: step_pb2.Hello
    last_heard: float
    has_heartbeat: bool = False
    busy_micros: int = 0
    last_seq: int = 0
    metrics: bytes = b""
    memory_bytes: int = 0

    @property
    def rank(self) -> int:
        return self.hello.rank

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.hello)


@dataclass(slots=True, eq=False)
class Group:
    """Ranks by number. `layout` is set by the first Hello and stays."""

    block_size: int  # that the scheduler is set to
    layout: Layout | None = None
    workers: dict[int, Worker] = field(default_factory=dict)
    highest_epoch: int = 0  # in any Hello

    @property
    def world_size(self) -> int:
        return self.layout.tp_size * self.layout.pp_size if self.layout else 1

    @property
    def complete(self) -> bool:
        return self.layout is not None and len(self.workers) == self.world_size

    @property
    def result_rank(self) -> int:
        """Rank 0 of the last stage."""
        assert self.layout is not None
        return self.layout.tp_size * (self.layout.pp_size - 1)

    @property
    def incarnation(self) -> tuple[int, ...]:
        """The worker processes, by rank: other processes, other memory."""
        return tuple(self.workers[r].hello.worker_epoch for r in sorted(self.workers))

    def by_peer(self, peer: bytes) -> Worker | None:
        for worker in self.workers.values():
            if worker.peer == peer:
                return worker
        return None

    def refusal(self, hello: step_pb2.Hello) -> str:
        """Why this worker can't join; '' when it can."""
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"worker speaks step protocol {hello.protocol_version}, "
                f"scheduler {PROTOCOL_VERSION}: install the same version of quire for both"
            )
        bounds = (
            ("max_slots", hello.max_slots, MAX_SLOTS),
            ("max_model_len", hello.max_model_len, MAX_MODEL_LEN),
            ("vocab_size", hello.vocab_size, MAX_VOCAB),
            ("block_size", hello.block_size, 1024),
            ("num_blocks", num_blocks(hello) - 1, MAX_BLOCKS),
            ("num_host_blocks", 1 + tier_of(hello, step_pb2.TIER_HOST).num_blocks, MAX_BLOCKS),
        )
        for name, value, high in bounds:
            if not 1 <= value <= high:
                return f"{name} {value} of the worker is not between 1 and {high}"
        if hello.block_size != self.block_size:
            return (
                f"block size {hello.block_size} of the worker is not the scheduler's "
                f"{self.block_size}: give both the same --block-size"
            )
        layout = Layout.of(hello)
        if hello.rank >= layout.tp_size * layout.pp_size or layout.tp_size * layout.pp_size > 1024:
            return f"rank {hello.rank} is outside a group of {layout.tp_size} x {layout.pp_size}"
        if not _is_hex(hello.model_digest):
            return "model_digest is no hexadecimal string"
        if len(hello.held_block_names) * 4 != len(hello.held_block_ids) * NAME_BYTES:
            return "held_block_ids and held_block_names differ in length"
        if len(hello.held_host_block_names) * 4 != len(hello.held_host_block_ids) * NAME_BYTES:
            return "held_host_block_ids and held_host_block_names differ in length"
        if self.layout is not None and layout != self.layout:
            for name in Layout.__dataclass_fields__:
                mine, theirs = getattr(self.layout, name), getattr(layout, name)
                if mine != theirs:
                    return f"{name} {theirs!r} of the worker is not the group's {mine!r}"
        return ""

    def join(self, peer: bytes, hello: step_pb2.Hello, now: float) -> None:
        """Take a worker in; one of the same rank or peer makes room."""
        self.layout = self.layout or Layout.of(hello)
        self.highest_epoch = max(self.highest_epoch, hello.highest_epoch)
        self.leave(peer)
        self.workers[hello.rank] = Worker(peer, hello, now)

    def leave(self, peer: bytes) -> None:
        worker = self.by_peer(peer)
        if worker is not None:
            del self.workers[worker.rank]

    def silent(self, now: float, limit: float = SILENCE_S) -> list[Worker]:
        """Workers of which nothing was heard for so long, though they used to send heartbeats."""
        return [w for w in self.workers.values() if w.has_heartbeat and now - w.last_heard > limit]

    def forgive(self, seconds: float) -> None:
        """The engine itself stood still: that silence is not the workers'."""
        for worker in self.workers.values():
            worker.last_heard += seconds

    def missing(self) -> str:
        """In words: the ranks that are not there."""
        gone = sorted(set(range(self.world_size)) - set(self.workers))
        return f"no worker of rank {', '.join(map(str, gone))} is connected" if gone else ""

    def inventory(self) -> tuple[I32, bytes]:
        """Blocks [n] that every rank holds under the same name, and the names (16 * n bytes)."""
        hellos = [worker.hello for worker in self.workers.values()]
        return _common([(h.held_block_ids, h.held_block_names) for h in hellos])

    def host_inventory(self) -> tuple[I32, bytes]:
        """The same for blocks of the host tier."""
        hellos = [worker.hello for worker in self.workers.values()]
        return _common([(h.held_host_block_ids, h.held_host_block_names) for h in hellos])

    def host_tier(self) -> step_pb2.TierSize:
        """What all ranks have of a host tier: the smallest size, the slowest copy; 0 blocks = none.
        block_bytes is that of all ranks together."""
        tiers = [tier_of(w.hello, step_pb2.TIER_HOST) for w in self.workers.values()]
        return step_pb2.TierSize(
            tier=step_pb2.TIER_HOST,
            num_blocks=min(tier.num_blocks for tier in tiers),
            block_bytes=sum(tier.block_bytes for tier in tiers),
            copy_micros=max(tier.copy_micros for tier in tiers),
        )

    def step_costs(self) -> list[Point]:
        """The slowest rank's table."""
        points: dict[StepSize, int] = {}
        for worker in self.workers.values():
            for cost in worker.hello.step_costs:
                size = StepSize(cost.num_tokens, cost.num_context_tokens, cost.num_attended_tokens)
                points[size] = max(points.get(size, 0), cost.micros)
        return [Point(size, micros) for size, micros in points.items()]


def num_blocks(hello: step_pb2.Hello) -> int:
    """Blocks on the device, the null block 0 included."""
    return int(tier_of(hello, step_pb2.TIER_DEVICE).num_blocks)


def tier_of(hello: step_pb2.Hello, which: step_pb2.Tier) -> step_pb2.TierSize:
    """The size of a tier; one of 0 blocks where the worker has none."""
    return next((tier for tier in hello.tiers if tier.tier == which), step_pb2.TierSize(tier=which))


def _common(inventories: list[tuple[bytes, bytes]]) -> tuple[I32, bytes]:
    """Blocks [n] that have the same name in all (ids i32, names 16 bytes each), and the names."""
    common: dict[int, bytes] | None = None
    for ids, names in inventories:
        blocks = np.frombuffer(ids, "<i4").tolist()
        held = {b: names[i * NAME_BYTES : (i + 1) * NAME_BYTES] for i, b in enumerate(blocks)}
        if common is None:
            common = held
        else:
            common = {b: name for b, name in common.items() if held.get(b) == name}
    common = common or {}
    return np.fromiter(common, np.int32, len(common)), b"".join(common.values())


def _is_hex(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True
