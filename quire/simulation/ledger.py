"""Ledger: what each simulated client saw, and the report made of it.

Times are those at the client: the table's costs of the way from and to the scheduler are in them.
Knows no engine; numbers of the engines are handed in at the end.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.latency_table import LatencyTable
from quire.simulation.trace import Arrival

if TYPE_CHECKING:
    from quire.simulation.world import Group
    from quire_scheduler.outputs import Outputs

ERROR = 4  # FinishReason of common.proto
PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Seen:
    """One request as its client sees it. Times on the world's clock; 0 = not yet."""

    arrival: Arrival
    group: int
    began: float
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0
    reason: int = 0
    error: str = ""

    @property
    def load(self) -> float:
        return self.arrival.num_prompt_tokens + self.arrival.num_output_tokens


@dataclass(slots=True)
class Ledger:
    """`seen` by request number; `loads` is the router's, told when a request ends."""

    table: LatencyTable
    loads: Any  # f64 [num_groups]
    seen: list[Seen] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))

    def deliver(self, group: Group, outputs: Outputs, now: float) -> None:
        """Rows leave the scheduler; each reaches its client a little after the one before."""
        at = now + group.worker.steps.times.pick(self.table.deliver_micros)
        each = self.table.deliver_row_micros * 1e-6
        counts = outputs.num_tokens.tolist()
        reasons = outputs.finish_reasons.tolist()
        cached = outputs.num_cached_tokens.tolist()
        for row, number in enumerate(outputs.handles.tolist()):
            seen = self.seen[number]
            if counts[row]:
                at = max(at, seen.last)  # a stream keeps its order
                if seen.num_tokens:
                    self.gaps.append(at - seen.last)
                else:
                    seen.first = at
                    seen.num_cached = cached[row]
                seen.last = at
                seen.num_tokens += counts[row]
                at += each
            if reasons[row]:
                seen.reason = reasons[row]
                self.loads[seen.group] -= seen.load
        for failure in outputs.failures:
            self.seen[failure.handle].error = failure.error.name

    def report(self, groups: Sequence[Group], seconds: float) -> dict[str, Any]:
        """Numbers of the whole run; the same run gives the same numbers. seconds: virtual ones."""
        done = [s for s in self.seen if s.reason and s.reason != ERROR]
        failed: dict[str, int] = {}
        for s in self.seen:
            if s.error:
                failed[s.error] = failed.get(s.error, 0) + 1
        ttft = np.array([s.first - s.began for s in self.seen if s.num_tokens])
        whole = np.array([s.last - s.began for s in done])
        stats = [g.engine.stats() for g in groups]
        counters = [g.engine.counters for g in groups]
        prompts = sum(s.arrival.num_prompt_tokens for s in self.seen if s.num_tokens)
        outputs = sum(s.num_tokens for s in self.seen)
        cached = sum(s.num_cached for s in self.seen)
        scheduled = sum(c.scheduled_tokens for c in counters)
        needed = prompts - cached + sum(max(s.num_tokens - 1, 0) for s in self.seen)
        asked = sum(s.prefix_query_tokens for s in stats)
        peaks = [
            g.peak_blocks / max(s.num_blocks_total, 1) for g, s in zip(groups, stats, strict=True)
        ]
        return {
            "requests": len(self.seen),
            "completed": len(done),
            "failed": dict(sorted(failed.items())),
            "unfinished": sum(1 for s in self.seen if not s.reason),
            "groups": len(groups),
            "virtual_s": round(seconds, 6),
            "ttft_ms": percentiles(ttft),
            "itl_ms": percentiles(np.frombuffer(self.gaps, float)),
            "e2e_ms": percentiles(whole),
            "prompt_tokens_per_s": round(prompts / seconds, 3) if seconds else 0.0,
            "output_tokens_per_s": round(outputs / seconds, 3) if seconds else 0.0,
            "prompt_tokens": prompts,
            "output_tokens": outputs,
            "prefix_hit_rate": round(sum(s.prefix_hit_tokens for s in stats) / max(asked, 1), 6),
            "cached_prompt_tokens": cached,
            "preemptions": sum(s.num_preemptions for s in stats),
            "recomputed_share": round(max(scheduled - needed, 0) / max(scheduled, 1), 6),
            "kv_peak": round(max(peaks), 6),
            "steps": sum(c.steps for c in counters),
            "violations": sum(len(g.worker.violations) for g in groups),
        }


def percentiles(seconds: Any) -> dict[str, float]:
    """Percentiles in ms; 0 where there is nothing."""
    if not len(seconds):
        return {"mean": 0.0, **{f"p{p}": 0.0 for p in PERCENTILES}, "max": 0.0}
    ms = np.sort(seconds) * 1e3
    found = {"mean": round(float(ms.mean()), 4)}
    for p in PERCENTILES:  # nearest rank: a value that was seen
        found[f"p{p}"] = round(float(ms[max(math.ceil(len(ms) * p / 100) - 1, 0)]), 4)
    return {**found, "max": round(float(ms[-1]), 4)}


def text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    failed = ", ".join(f"{n} {name}" for name, n in report["failed"].items())
    lines = [
        f"{report['completed']} of {report['requests']} requests completed"
        + (f"; failed: {failed}" if failed else "")
        + (f"; unfinished: {report['unfinished']}" if report["unfinished"] else "")
        + f"; {report['virtual_s']:.1f} s of virtual time, {report['groups']} worker(s)",
        f"{'ms':<8}{'mean':>10}" + "".join(f"{f'p{p}':>10}" for p in PERCENTILES) + f"{'max':>10}",
    ]
    for key, name in (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("e2e_ms", "request")):
        lines.append(f"{name:<8}" + "".join(f"{v:>10.2f}" for v in report[key].values()))
    lines += [
        f"throughput      {report['output_tokens_per_s']:.1f} output, "
        f"{report['prompt_tokens_per_s']:.1f} prompt tokens/s",
        f"prefix cache    {100 * report['prefix_hit_rate']:.1f} % of prompt tokens hit",
        f"KV memory       {100 * report['kv_peak']:.1f} % used at the peak, "
        f"{report['preemptions']} preemptions, "
        f"{100 * report['recomputed_share']:.2f} % of tokens computed again",
        f"steps           {report['steps']}",
    ]
    if report["violations"]:
        lines.append(f"BROKEN RULES    {report['violations']} plans broke the step protocol")
    return "\n".join(lines)
