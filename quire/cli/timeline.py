"""A journal as a story: one event per plan, result and Hello, with who was where.

Knows frames and counts; needs no weights, no tensor library and no numpy. `Tracker` follows who
has which slot; `events` makes JSON-able dicts of it, `text` a line of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from quire.v1 import common_pb2
from quire.v1 import step_pb2 as pb
from quire.wire import unpack_i32

if TYPE_CHECKING:
    from quire_scheduler.segment import Segment

Event = dict[str, Any]


@dataclass(eq=False, slots=True)
class Tenant:
    """A request in a slot, as far as the journal tells."""

    request_id: str
    slot: int
    prompt: bytes  # i32 [num_prompt_tokens]; empty when dropped for privacy
    num_prompt_tokens: int  # 0 = not known (yet)
    num_output_tokens: int
    pools: bool
    computed: int  # tokens, by plans sent
    ended: str = ""  # "stop" or "error", said by the worker


@dataclass(slots=True)
class Tracker:
    """Who has which slot. Feed it plans and results in order; a new epoch empties the slots."""

    slots: dict[int, Tenant] = field(default_factory=dict)
    epoch: int = 0
    in_flight: dict[tuple[int, int], dict[int, Tenant]] = field(default_factory=dict)

    def plan(self, plan: pb.StepPlan) -> tuple[list[Tenant], list[Tenant], dict[int, Tenant]]:
        """(retired, admitted, rows by slot)."""
        retired = []
        if plan.epoch != self.epoch:
            self.epoch = plan.epoch
            self.slots.clear()
            self.in_flight.clear()
        for slot in unpack_i32(plan.retired_slots):
            tenant = self.slots.pop(slot, None)
            if tenant is not None:
                retired.append(tenant)
        admitted = [_tenant(admit) for admit in plan.admit]
        self.slots.update({tenant.slot: tenant for tenant in admitted})
        rows = {}
        columns = (unpack_i32(plan.slots), unpack_i32(plan.num_tokens), plan.flags)
        for slot, num_tokens, flags in zip(*columns, strict=True):
            tenant = self.slots.get(slot)
            if tenant is None:
                continue  # the journal's beginning was deleted, or it is another's
            rows[slot] = tenant
            tenant.computed += num_tokens
            if flags & pb.ROW_FLAG_SAMPLE and not tenant.num_prompt_tokens:
                tenant.num_prompt_tokens = tenant.computed
        self.in_flight[plan.epoch, plan.seq] = rows
        return retired, admitted, rows

    def result(self, result: pb.StepResult) -> tuple[dict[int, Tenant], list[Tenant]]:
        """(rows of its plan, those among them that ended by it)."""
        rows = self.in_flight.pop((result.epoch, result.seq), {})
        ended = []
        columns = (unpack_i32(result.slots), result.num_outputs, result.finished)
        for slot, num_outputs, finished in zip(*columns, strict=True):
            tenant = rows.get(slot)
            if tenant is None:
                continue
            tenant.num_output_tokens += num_outputs
            if finished and num_outputs and not tenant.ended:
                tenant.ended = "stop"
                ended.append(tenant)
        for error in result.row_errors:
            tenant = rows.get(error.slot) or self.slots.get(error.slot)
            if tenant is not None and not tenant.ended:
                tenant.ended = "error"
        return rows, ended


def _tenant(admit: pb.Admit) -> Tenant:
    return Tenant(
        request_id=admit.request_id,
        slot=admit.slot,
        prompt=admit.prompt_token_ids,
        num_prompt_tokens=len(admit.prompt_token_ids) // 4,
        num_output_tokens=len(admit.output_token_ids) // 4,
        pools=admit.kind == common_pb2.REQUEST_KIND_POOL,
        computed=admit.num_computed_tokens,
    )


def events(found: Iterable[Segment]) -> Iterator[Event]:
    """Every record as an event. `t`: seconds since the first segment began, by the wall clock."""
    from quire_scheduler.segment import Direction

    begin: int | None = None
    for segment in found:
        header = segment.header
        begin = header.created_ns if begin is None else begin
        offset = header.created_ns - header.monotonic_ns - begin
        yield {
            "t": round((header.created_ns - begin) * 1e-9, 6), "kind": "segment",
            "name": segment.path.name, "begun": utc(header.created_ns), "model": header.model,
            "privacy": header.privacy, "software": header.software, "run": header.run,
            "number": header.number,
        }  # fmt: skip
        tracker = Tracker()
        sent: dict[tuple[int, int], int] = {}
        for record in segment:
            event: Event = {"t": round((record.monotonic_ns + offset) * 1e-9, 6)}
            if record.direction is Direction.PLAN:
                plan = pb.SchedulerFrame.FromString(record.frame).plan
                sent[plan.epoch, plan.seq] = record.monotonic_ns
                yield event | _plan(plan, *tracker.plan(plan))
                continue
            message = pb.WorkerFrame.FromString(record.frame)
            kind = message.WhichOneof("message")
            if kind == "result":
                result = message.result
                at = sent.pop((result.epoch, result.seq), None)
                took = None if at is None else round((record.monotonic_ns - at) * 1e-6, 3)
                yield event | _result(result, took, *tracker.result(result))
            elif kind == "ack":
                ack = message.ack
                status = _name(pb.StepStatus.Name(ack.status))
                yield event | {"kind": "ack", "epoch": ack.epoch, "seq": ack.seq,
                               "status": status, "error": ack.error}  # fmt: skip
            else:
                yield event | _hello(message.hello)
        if segment.torn:
            yield {"kind": "torn", "name": segment.path.name, "byte": segment.byte}


def _plan(
    plan: pb.StepPlan, retired: list[Tenant], admitted: list[Tenant], rows: dict[int, Tenant]
) -> Event:
    num_tokens = unpack_i32(plan.num_tokens)
    decode = num_tokens.count(1)
    return {
        "kind": "plan", "epoch": plan.epoch, "seq": plan.seq, "rows": len(num_tokens),
        "decode": decode, "prefill": len(num_tokens) - decode, "tokens": sum(num_tokens),
        "admits": [
            {
                "slot": t.slot, "request": t.request_id, "prompt": t.num_prompt_tokens,
                "output": t.num_output_tokens, "computed": admit.num_computed_tokens,
                "blocks": len(admit.block_ids) // 4, "waited_ms": admit.waited_micros / 1000,
            }
            for t, admit in zip(admitted, plan.admit, strict=True)
        ],
        "retired": [
            {"slot": t.slot, "request": t.request_id, "output": t.num_output_tokens}
            for t in retired
        ],
        "new_blocks": len(plan.new_block_ids) // 4, "named": len(plan.named_block_ids) // 4,
        "kv_ops": [
            {"kind": _name(pb.KvOpKind.Name(op.kind)), "id": op.op_id,
             "blocks": max(len(op.src_block_ids), len(op.dst_block_ids)) // 4}
            for op in plan.kv_ops
        ],
        "requests": [t.request_id for t in rows.values()],
    }  # fmt: skip


def _result(
    result: pb.StepResult, took_ms: float | None, rows: dict[int, Tenant], ended: list[Tenant]
) -> Event:
    times = result.timings
    names = {t.slot: t.request_id for t in rows.values()}
    return {
        "kind": "result", "epoch": result.epoch, "seq": result.seq,
        "status": _name(pb.StepStatus.Name(result.status)), "error": result.error,
        "tokens": sum(result.num_outputs), "stopped": [t.request_id for t in ended],
        "errors": [
            {"slot": row.slot, "request": names.get(row.slot, ""), "error": row.error.name,
             "message": row.error.message}
            for row in result.row_errors
        ],
        "ms": {
            "total": took_ms, "queue": times.queue_micros / 1000,
            "prepare": times.prepare_micros / 1000, "forward": times.forward_micros / 1000,
            "sample": times.sample_micros / 1000, "idle": times.idle_micros / 1000,
        },
        "kv_ops_done": list(result.kv_ops_done), "requests": list(names.values()),
    }  # fmt: skip


def _hello(hello: pb.Hello) -> Event:
    return {
        "kind": "hello", "rank": hello.rank, "model": hello.model, "digest": hello.model_digest,
        "dtype": hello.dtype, "device": hello.device, "block_size": hello.block_size,
        "blocks": next((t.num_blocks for t in hello.tiers if t.tier == pb.TIER_DEVICE), 0),
        "slots": hello.max_slots, "worker_epoch": hello.worker_epoch,
        "held": len(hello.held_block_ids) // 4, "software": hello.software_version,
    }  # fmt: skip


def utc(ns: int) -> str:
    """'2026-11-20T15:46:25.123Z'."""
    when = datetime.fromtimestamp(ns / 1e9, UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"


def _name(enum: str) -> str:
    """'offload' of 'KV_OP_KIND_OFFLOAD'."""
    return enum.rpartition("_")[2].lower()


# -- in words -----------------------------------------------------------------------------
def text(event: Event) -> str:
    """One line."""
    when = f"{event['t']:10.3f}" if "t" in event else " " * 10
    return f"{when}  {event['kind']:<8}{_WORDS[event['kind']](event)}"


def _say_plan(e: Event) -> str:
    parts = [f"{e['rows']} rows"]
    if e["rows"]:
        parts[0] += f" ({e['decode']} decode, {e['prefill']} prefill), {e['tokens']} tokens"
    for a in e["admits"]:
        counts = f"prompt {a['prompt'] or '?'}"
        counts += f" + {a['output']} output" if a["output"] else ""
        counts += f", {a['computed']} computed" if a["computed"] else ""
        waited = f", waited {a['waited_ms']:.1f} ms" if a["waited_ms"] else ""
        parts.append(f"+ slot {a['slot']} {a['request']} ({counts}{waited})")
    parts += [f"- slot {r['slot']} {r['request']} ({r['output']} output)" for r in e["retired"]]
    parts += [f"{op['kind']} {op['blocks']} blocks (order {op['id']})" for op in e["kv_ops"]]
    for what in ("new_blocks", "named"):
        if e[what]:
            parts.append(f"{e[what]} {what.replace('_', ' ')}")
    return f"{e['epoch']}/{e['seq']}: " + "; ".join(parts)


def _say_result(e: Event) -> str:
    step = f"{e['epoch']}/{e['seq']}: "
    if e["status"] != "ok":
        return f"{step}{e['status'].upper()} {e['error']}"
    ms = e["ms"]
    times = ", ".join(f"{k} {ms[k]:.1f}" for k in ("queue", "prepare", "forward", "sample", "idle"))
    total = "" if ms["total"] is None else f" after {ms['total']:.1f} ms"
    parts = [f"{e['tokens']} tokens{total} ({times})"]
    parts += [f"stopped {request}" for request in e["stopped"]]
    parts += [f"{x['error']} in slot {x['slot']} {x['request']}" for x in e["errors"]]
    if e["kv_ops_done"]:
        parts.append(f"orders done: {', '.join(map(str, e['kv_ops_done']))}")
    return step + "; ".join(parts)


def _say_hello(e: Event) -> str:
    return (
        f"rank {e['rank']}: {e['model']} {e['digest'][:12]} {e['dtype']} on {e['device']}, "
        f"{e['blocks']} blocks of {e['block_size']}, {e['slots']} slots, {e['held']} blocks held"
    )


def _say_segment(e: Event) -> str:
    return f"{e['name']}: {e['model']}, begun {e['begun']}, privacy {e['privacy']}"


_WORDS: dict[str, Callable[[Event], str]] = {
    "plan": _say_plan,
    "result": _say_result,
    "hello": _say_hello,
    "segment": _say_segment,
    "ack": lambda e: f"{e['epoch']}/{e['seq']}: {e['status']} {e['error']}".rstrip(),
    "torn": lambda e: f"{e['name']} ends inside the record at byte {e['byte']}",
}
