"""What a complete worker group offers: its KV memory as books, its limits, the model it serves.

Knows no request and no plan. Called when the workers' memory is another than the books describe.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from quire.config import EngineConfig
from quire.step_cost import StepCostModel
from quire_scheduler.admission import ModelInfo
from quire_scheduler.group import Group, num_blocks
from quire_scheduler.kv import HostTier, KVManager, ModelIdentity
from quire_scheduler.preemption import recompute_s
from quire_scheduler.shares import Limits

log = logging.getLogger("quire.scheduler")


@dataclass(frozen=True, slots=True)
class Memory:
    """`kv` holds nothing but what the workers said they hold by name."""

    incarnation: tuple[int, ...]  # the processes it lives in
    kv: KVManager
    model: ModelInfo
    limits: Limits
    cost: StepCostModel
    num_adopted: int  # blocks known by name


def describe(group: Group, config: EngineConfig, old: KVManager | None) -> Memory:
    """New books for the group's memory; they go on with the running totals of the old ones."""
    layout = group.layout
    assert layout is not None and group.complete
    hellos = [worker.hello for worker in group.workers.values()]
    first = group.workers[group.result_rank].hello
    blocks = min(num_blocks(hello) for hello in hellos)
    max_slots = min(hello.max_slots for hello in hellos)
    # A request alone must always fit: the context ends where the memory does.
    longest = min([h.max_model_len for h in hellos] + [(blocks - 1) * layout.block_size])
    if config.max_model_len:
        longest = min(longest, config.max_model_len)
    kv = KVManager(
        blocks,
        layout.block_size,
        ModelIdentity(
            bytes.fromhex(layout.model_digest),
            layout.dtype,
            layout.kv_dtype,
            config.kv_name_key.encode(),
        ),
        enable_prefix_caching=config.enable_prefix_caching,
        eviction_policy=config.eviction_policy,
        max_requests=max_slots,
        max_blocks_per_request=-(-longest // layout.block_size),
    )
    if old is not None:
        kv.stats = old.stats
    cost = StepCostModel(group.step_costs())
    num_adopted = kv.adopt_inventory(*group.inventory())
    kv.host = _host_tier(group, config, cost, kv, old)
    if kv.host is not None:
        num_adopted += kv.host.adopt(*group.host_inventory())
    return Memory(
        incarnation=group.incarnation,
        kv=kv,
        model=ModelInfo(
            model=layout.model,
            model_digest=layout.model_digest,
            dtype=layout.dtype,
            kv_dtype=layout.kv_dtype,
            block_size=layout.block_size,
            num_blocks=kv.num_usable,
            max_model_len=longest,
            vocab_size=layout.vocab_size,
            eos_token_ids=layout.eos_token_ids,
            max_slots=max_slots,
            device=first.device,
            attention_backend=first.attention_backend,
            system_fingerprint=first.system_fingerprint,
        ),
        limits=Limits(
            config.max_num_batched_tokens or cost.default_budget,
            config.max_num_seqs,
            config.enable_chunked_prefill,
        ),
        cost=cost,
        num_adopted=num_adopted,
    )


def _host_tier(
    group: Group, config: EngineConfig, cost: StepCostModel, kv: KVManager, old: KVManager | None
) -> HostTier | None:
    """Books for the memory beside the device; None without it, or without a cache to keep there."""
    tier = group.host_tier()
    if not tier.num_blocks:
        return None
    if not config.enable_prefix_caching:
        log.warning(
            "the workers have a host tier of %d blocks (--host-cache-memory), unused: "
            "it keeps what the prefix cache lets go (--enable-prefix-caching is off)",
            tier.num_blocks,
        )
        return None
    host = HostTier(
        tier.num_blocks,
        kv.block_size,
        tier.copy_micros * 1e-6,
        lambda first, num_tokens: float(recompute_s(cost, first, num_tokens)),
        kv.clock,
        block_bytes=tier.block_bytes,
    )
    if old is not None and old.host is not None:
        host.stats = old.host.stats
    return host
