"""A simulated worker: the step protocol over a WorkerLink, no model, every rule checked.

Its KV memory holds, per block and offset, a hash of all tokens up to that position, so a row that
reads a block freed too early, shared wrongly, written twice or never sees a wrong hash and the
step FAILS with the reason in `violations`. A token is a function of that hash and the seed: a
stream can be checked against `oracle()` whatever the batch, chunking or preemption was.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.link import WorkerLink
from quire.step_cost import attended
from quire.v1 import step_pb2 as pb
from quire.wire import PROTOCOL_VERSION

MASK = (1 << 64) - 1
NAME = 16
UNWRITTEN = 0


def extend_hash(state: int, token: int) -> int:
    """Hash of a prefix one token longer."""
    z = ((state ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) & MASK
    return (z ^ (z >> 29)) or 1


def next_token(state: int, seed: int, vocab_size: int, eos_every: int, eos: int) -> int:
    """The token after a prefix of this hash: EOS once in `eos_every` (0 = never)."""
    z = extend_hash(state, seed & 0x7FFFFFFF)
    if eos_every and (z >> 8) % eos_every == 0:
        return eos
    token = (z >> 20) % vocab_size
    return token if token != eos else (token + 1) % vocab_size


def oracle(
    prompt: Sequence[int],
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    max_model_len: int = 512,
    vocab_size: int = 997,
    eos_every: int = 0,
    eos: int = 2,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> tuple[list[int], str]:
    """What an undisturbed run yields: (output tokens, 'stop' or 'length')."""
    state = UNWRITTEN
    for token in prompt:
        state = extend_hash(state, token)
    room = max_model_len - len(prompt)
    out: list[int] = []
    while True:
        token = next_token(state, seed, vocab_size, eos_every, eos)
        out.append(token)
        if (token == eos and not ignore_eos) or token in stop_token_ids:
            return out, "stop"
        if len(out) >= min(room, max_tokens if max_tokens is not None else room):
            return out, "length"
        state = extend_hash(state, token)


@dataclass
class Slot:
    """One request on the worker: its tokens, the hash after each of them, its blocks."""

    request_id: str
    tokens: list[int]
    hashes: list[int]  # [len(tokens)]
    num_prompt: int
    computed: int
    blocks: list[int]
    seed: int
    ignore_eos: bool
    stop_ids: tuple[int, ...]
    logprobs: int | None
    finished: bool = False


@dataclass
class Options:
    """How the worker looks and misbehaves."""

    num_blocks: int = 64
    block_size: int = 16
    num_host_blocks: int = 0
    copy_micros: int = 1
    max_slots: int = 32
    max_model_len: int = 512
    vocab_size: int = 997
    eos: int = 2
    eos_every: int = 0
    model: str = "fake"
    digest: str = "00" * 16
    rank: int = 0
    tp_size: int = 1
    step_costs: Sequence[tuple[int, int, int]] = ()
    latency: Callable[[int], float] | None = None  # step tokens -> seconds to sleep
    fail: Callable[[pb.StepPlan, FakeWorker], str] | None = None  # '' = run it, text = FAILED
    row_error: Callable[[Slot], str] | None = None  # '' = fine, else an error name
    check_reads: bool = True
    heartbeats: bool = False
    protocol_version: int = PROTOCOL_VERSION


class Violation(Exception):
    """A plan broke a rule of the protocol."""


@dataclass
class FakeWorker:
    """`pump()` runs what is there, for tests without threads; `start()` runs it in a thread."""

    link: WorkerLink
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        o = self.options
        self.worker_epoch = random.getrandbits(63) | 1
        self.kv = np.zeros((o.num_blocks, o.block_size), np.uint64)  # hash at that position
        self.names: dict[int, bytes] = {}  # block -> name
        self.host_kv = np.zeros((o.num_host_blocks, o.block_size), np.uint64)
        self.host_names: dict[int, bytes] = {}
        self.num_copied = {"offload": 0, "load": 0}  # blocks
        self.name_content: dict[bytes, int] = {}  # name -> hash at the block's end
        self.slots: dict[int, Slot] = {}
        self.epoch = 0
        self.highest_epoch = 0
        self.last_seq = 0
        self.broken = ""
        self.welcomes: list[int] = []
        self.refusal = ""
        self.violations: list[str] = []
        self.plans: list[pb.StepPlan] = []  # executed, when `keep_plans`
        self.keep_plans = False
        self.results: deque[pb.StepResult] = deque(maxlen=8)
        self.num_steps = 0
        self.dead = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life -------------------------------------------------------------------------------
    def hello(self) -> None:
        self.send(pb.WorkerFrame(hello=self.hello_message()))

    def hello_message(self) -> pb.Hello:
        o = self.options
        held, held_on_host = sorted(self.names), sorted(self.host_names)
        tiers = [pb.TierSize(tier=pb.TIER_DEVICE, num_blocks=o.num_blocks, block_bytes=1024)]
        if o.num_host_blocks:
            host = pb.TierSize(tier=pb.TIER_HOST, num_blocks=o.num_host_blocks, block_bytes=1024)
            host.copy_micros = o.copy_micros
            tiers.append(host)
        return pb.Hello(
            protocol_version=o.protocol_version,
            rank=o.rank,
            tp_rank=o.rank,
            tp_size=o.tp_size,
            pp_size=1,
            worker_epoch=self.worker_epoch,
            highest_epoch=self.highest_epoch,
            last_seq=self.last_seq,
            model=o.model,
            model_digest=o.digest,
            dtype="float32",
            kv_dtype="float32",
            block_size=o.block_size,
            tiers=tiers,
            max_slots=o.max_slots,
            max_model_len=o.max_model_len,
            vocab_size=o.vocab_size,
            eos_token_ids=[o.eos],
            device="fake",
            attention_backend="none",
            step_costs=[
                pb.StepCost(
                    num_tokens=t,
                    num_context_tokens=c,
                    num_attended_tokens=attended(t, c),
                    micros=m,
                )
                for t, c, m in o.step_costs
            ],
            held_block_ids=np.array(held, "<i4").tobytes(),
            held_block_names=b"".join(self.names[b] for b in held),
            held_host_block_ids=np.array(held_on_host, "<i4").tobytes(),
            held_host_block_names=b"".join(self.host_names[b] for b in held_on_host),
            system_fingerprint="fp_fake",
        )

    def send(self, frame: pb.WorkerFrame) -> None:
        if not self.dead:
            self.link.send(frame.SerializeToString())

    def pump(self, limit: int = 1000) -> int:
        """Handle up to `limit` frames that are there; how many there were."""
        done = 0
        while done < limit and not self.dead:
            frame = self.link.recv(0.0 if self._thread is None else 0.05)
            if frame is None:
                break
            self.on_frame(frame)
            done += 1
        return done

    def start(self) -> None:
        """Say Hello and serve in a thread until stop()."""
        self._thread = threading.Thread(target=self._run, name="fake-worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        said = beat = time.monotonic()
        self.hello()
        while not self._stop.is_set() and not self.dead:
            self.pump(1)
            if not self.welcomes and time.monotonic() - said > 0.2:
                said = time.monotonic()
                self.hello()
            if self.options.heartbeats and time.monotonic() - beat > 0.2:
                beat = time.monotonic()
                self.heartbeat()

    def heartbeat(self, busy_micros: int = 0, metrics: bytes = b"# worker page\n") -> None:
        self.send(
            pb.WorkerFrame(
                heartbeat=pb.Heartbeat(
                    epoch=self.epoch,
                    last_seq=self.last_seq,
                    busy_micros=busy_micros,
                    metrics=metrics,
                )
            )
        )

    def die(self) -> None:
        """kill -9: not a word more."""
        self.dead = True

    # -- frames -----------------------------------------------------------------------------
    def on_frame(self, frame: bytes) -> None:
        message = pb.SchedulerFrame()
        message.ParseFromString(frame)
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self.welcomes.append(message.welcome.epoch)
        elif kind == "refusal":
            self.refusal = message.refusal.reason
        elif kind == "plan":
            if self.options.rank == 0:
                self.send(pb.WorkerFrame(result=self.execute(message.plan)))
            else:
                result = self.execute(message.plan)
                ack = pb.Ack(
                    epoch=result.epoch,
                    seq=result.seq,
                    worker_epoch=result.worker_epoch,
                    status=result.status,
                    error=result.error,
                )
                self.send(pb.WorkerFrame(ack=ack))

    def execute(self, plan: pb.StepPlan) -> pb.StepResult:
        answer = pb.StepResult(
            epoch=plan.epoch,
            seq=plan.seq,
            worker_epoch=self.worker_epoch,
            status=pb.STEP_STATUS_REFUSED,
        )
        self.highest_epoch = max(self.highest_epoch, plan.epoch)
        if plan.epoch < self.epoch:
            answer.error = "old epoch"
            return answer
        if plan.epoch > self.epoch:
            if plan.seq != 1:
                answer.error = "epoch begins beyond plan 1"
                return answer
            self.epoch, self.last_seq, self.broken = plan.epoch, 0, ""
            self.slots.clear()
            self.results.clear()
        if plan.seq <= self.last_seq:
            for result in self.results:
                if result.seq == plan.seq:
                    return result
            answer.error = "result is gone"
            return answer
        if plan.seq != self.last_seq + 1 and not self.broken:
            self.broken = f"gap: plan {plan.seq} after {self.last_seq}"
        if self.broken:
            answer.error = self.broken
            return answer
        self.last_seq = plan.seq
        why = self.options.fail(plan, self) if self.options.fail else ""
        if not why and not self.dead:
            try:
                self._step(plan, answer)
                answer.status = pb.STEP_STATUS_OK
            except Violation as error:
                self.violations.append(str(error))
                why = f"violation: {error}"
        if why:
            answer = pb.StepResult(
                epoch=plan.epoch,
                seq=plan.seq,
                worker_epoch=self.worker_epoch,
                status=pb.STEP_STATUS_FAILED,
                error=why,
            )
            self.broken = why
        self.results.append(answer)
        return answer

    # -- one step ---------------------------------------------------------------------------
    def _step(self, plan: pb.StepPlan, result: pb.StepResult) -> None:
        o = self.options
        begin = time.perf_counter()
        for slot in i32(plan.retired_slots):
            if slot not in self.slots:
                raise Violation(f"retired slot {slot} is free")
            del self.slots[slot]
        for op in plan.kv_ops:
            self._copy(op)
            result.kv_ops_done.append(op.op_id)
        fresh: set[int] = set()
        errors: dict[int, str] = {}
        for admit in plan.admit:
            self._admit(admit, fresh)
            slot_state = self.slots[admit.slot]
            name = o.row_error(slot_state) if o.row_error else ""
            if name:
                slot_state.finished = True
                errors[admit.slot] = name
        for slot, block in zip(i32(plan.new_block_rows), i32(plan.new_block_ids), strict=True):
            if slot not in self.slots:
                raise Violation(f"a block for free slot {slot}")
            self._take_block(block, slot, fresh)
            self.slots[slot].blocks.append(block)
        slots, nums = i32(plan.slots), i32(plan.num_tokens)
        if not len(slots) == len(nums) == len(plan.flags) or len(set(slots)) != len(slots):
            raise Violation("row columns do not fit each other")
        rows = []
        written: dict[tuple[int, int], int] = {}
        for slot, num, flags in zip(slots, nums, plan.flags, strict=True):
            state = self.slots.get(slot)
            if state is None:
                raise Violation(f"a row for free slot {slot}")
            if state.finished:
                rows.append((slot, state, flags, False))
                continue
            end = state.computed + num
            if num < 1 or end > len(state.tokens):
                raise Violation(f"row {slot} computes up to {end} of {len(state.tokens)} tokens")
            if end > len(state.blocks) * o.block_size:
                raise Violation(f"block table of slot {slot} is shorter than its tokens")
            if bool(flags & pb.ROW_FLAG_SAMPLE) != (end == len(state.tokens)):
                raise Violation(f"row {slot} has a wrong SAMPLE flag")
            for position in range(state.computed, end):
                at = (state.blocks[position // o.block_size], position % o.block_size)
                if at in written:
                    raise Violation(f"block {at[0]} offset {at[1]} is written twice in a step")
                written[at] = state.hashes[position]
            rows.append((slot, state, flags, True))
        for (block, offset), value in written.items():
            self.kv[block, offset] = value
        for slot, num in zip(slots, nums, strict=True):
            state = self.slots[slot]
            if not state.finished:
                state.computed += num
        if o.check_reads:
            for _, state, _, runs in rows:
                if runs:
                    self._check_reads(state)
        for block, name in zip(i32(plan.named_block_ids), names(plan.block_names), strict=True):
            self._name(block, name)
        self._sample(rows, errors, result)
        for slot, name in errors.items():
            row = result.row_errors.add(slot=slot)
            row.error.name, row.error.message = name, f"slot {slot} failed alone"
        self.num_steps += 1
        if self.keep_plans:
            self.plans.append(plan)
        if o.latency is not None:
            time.sleep(o.latency(sum(nums)))
        result.timings.forward_micros = int((time.perf_counter() - begin) * 1e6)

    def _copy(self, op: pb.KvOp) -> None:
        """Device to host or back; what a name stands for is checked on both ways."""
        o, src, dst = self.options, i32(op.src_block_ids), i32(op.dst_block_ids)
        column = names(op.block_names)
        if not len(src) == len(dst) == len(column) == len(set(dst)):
            raise Violation("columns of a copy do not fit each other")
        out = op.kind == pb.KV_OP_KIND_OFFLOAD
        if not out and op.kind != pb.KV_OP_KIND_LOAD:
            raise Violation(f"copy of kind {op.kind}")
        device, host = (src, dst) if out else (dst, src)
        if not all(1 <= b < o.num_blocks for b in device):
            raise Violation("a copy names a device block that does not exist")
        if not all(0 <= b < o.num_host_blocks for b in host):
            raise Violation("a copy names a host block that does not exist")
        for block, host_block, name in zip(device, host, column, strict=True):
            if out:
                end = int(self.kv[block, -1])
                if end == UNWRITTEN or self.name_content.setdefault(name, end) != end:
                    raise Violation(f"block {block} goes to the host under a wrong name")
                self.host_kv[host_block], self.host_names[host_block] = self.kv[block], name
            else:
                if self.host_names.get(host_block) != name:
                    raise Violation(f"host block {host_block} does not hold what is loaded")
                self.kv[block], self.names[block] = self.host_kv[host_block], name
        self.num_copied["offload" if out else "load"] += len(src)

    def _admit(self, admit: pb.Admit, fresh: set[int]) -> None:
        o = self.options
        if admit.slot in self.slots or admit.slot >= o.max_slots:
            raise Violation(f"slot {admit.slot} is not free")
        prompt, output = i32(admit.prompt_token_ids), i32(admit.output_token_ids)
        tokens = prompt + output
        if not prompt or not 0 <= admit.num_computed_tokens < len(tokens):
            raise Violation("an admission has nothing to compute")
        if not admit.sampling_params.HasField("seed"):
            raise Violation("an admission has no seed")
        hashes, state = [], UNWRITTEN
        for token in tokens:
            state = extend_hash(state, token)
            hashes.append(state)
        blocks = i32(admit.block_ids)
        # what was computed may end inside a block, which then goes on with its content
        shared = -(-admit.num_computed_tokens // o.block_size)
        if shared > len(blocks):
            raise Violation("more tokens computed than the block table holds")
        params = admit.sampling_params
        self.slots[admit.slot] = Slot(
            admit.request_id,
            tokens,
            hashes,
            len(prompt),
            admit.num_computed_tokens,
            blocks,
            params.seed,
            params.ignore_eos,
            tuple(params.stop_token_ids),
            params.logprobs if params.HasField("logprobs") else None,
        )
        for block in blocks[shared:]:
            self._take_block(block, admit.slot, fresh)

    def _take_block(self, block: int, slot: int, fresh: set[int]) -> None:
        """The block gets a new owner: its content and name are gone."""
        if not 1 <= block < self.options.num_blocks:
            raise Violation(f"block {block} does not exist")
        if block in fresh:
            raise Violation(f"block {block} is given out twice in a plan")
        fresh.add(block)
        self.kv[block] = UNWRITTEN
        self.names.pop(block, None)

    def _check_reads(self, state: Slot) -> None:
        """Every position up to the computed one must hold the hash of this very prefix."""
        n = state.computed
        found = self.kv[state.blocks].ravel()[:n]
        expected = np.array(state.hashes[:n], np.uint64)
        if not np.array_equal(found, expected):
            at = int((found != expected).argmax())
            block = state.blocks[at // self.options.block_size]
            raise Violation(f"{state.request_id}: position {at} in block {block} is not its own")

    def _name(self, block: int, name: bytes) -> None:
        end = int(self.kv[block, -1])
        if end == UNWRITTEN:
            if any(s.finished and block in s.blocks for s in self.slots.values()):
                return  # its row was skipped: nothing to name
            raise Violation(f"block {block} is named before it was written")
        if self.name_content.setdefault(name, end) != end:
            raise Violation(f"name {name.hex()} stands for two contents")
        self.names[block] = name

    def _sample(
        self,
        rows: list[tuple[int, Slot, int, bool]],
        errors: dict[int, str],
        result: pb.StepResult,
    ) -> None:
        o = self.options
        out_slots, counts, tokens, finished = [], [], [], []
        lp_counts: list[int] = []
        lp_ids: list[int] = []
        lp_values: list[float] = []
        pooled: list[list[float]] = []
        for slot, state, flags, runs in rows:
            if not flags & pb.ROW_FLAG_SAMPLE:
                continue
            out_slots.append(slot)
            if not runs or slot in errors:
                counts.append(0)
                finished.append(1)
                continue
            if flags & pb.ROW_FLAG_POOL:
                pooled.append(embedding(state.tokens))
                counts.append(0)
                finished.append(0)
                continue
            token = next_token(state.hashes[-1], state.seed, o.vocab_size, o.eos_every, o.eos)
            state.tokens.append(token)
            state.hashes.append(extend_hash(state.hashes[-1], token))
            stop = (token == o.eos and not state.ignore_eos) or token in state.stop_ids
            state.finished = stop
            counts.append(1)
            tokens.append(token)
            finished.append(int(stop))
            if flags & pb.ROW_FLAG_LOGPROBS and state.logprobs is not None:
                k = state.logprobs + 1
                lp_counts.append(k)
                lp_ids += [token] + [(token + i) % o.vocab_size for i in range(1, k)]
                lp_values += [-0.5 * (i + 1) for i in range(k)]
            else:
                lp_counts.append(0)
        result.slots = np.array(out_slots, "<i4").tobytes()
        result.num_outputs = bytes(counts)
        result.token_ids = np.array(tokens, "<i4").tobytes()
        result.finished = bytes(finished)
        result.pooled = np.array(pooled, "<f4").tobytes()
        if any(lp_counts):
            result.logprobs.counts = np.array(lp_counts, "<u4").tobytes()
            result.logprobs.token_ids = np.array(lp_ids, "<i4").tobytes()
            result.logprobs.logprobs = np.array(lp_values, "<f4").tobytes()
            result.logprobs.ranks = np.array([1 if c else 0 for c in lp_counts], "<u4").tobytes()


def embedding(tokens: Sequence[int]) -> list[float]:
    """What a request that pools gets."""
    return [float(len(tokens)), float(sum(tokens)), float(tokens[-1])]


def i32(data: bytes) -> list[int]:
    return [int(v) for v in np.frombuffer(data, "<i4")]


def names(data: bytes) -> list[bytes]:
    return [data[i : i + NAME] for i in range(0, len(data), NAME)]


def block_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """F3's chain, for tests that check names."""
    return hashlib.blake2b(previous + np.array(tokens, "<i4").tobytes(), digest_size=NAME).digest()
