"""KV bookkeeping of the scheduler; README.md in this folder is its contract."""

from quire_scheduler.kv.blocks import BlockAccountingError
from quire_scheduler.kv.explain import BlockInfo
from quire_scheduler.kv.handle import KVHandle, KVStats
from quire_scheduler.kv.manager import KVManager
from quire_scheduler.kv.names import ModelIdentity, Namespace
from quire_scheduler.kv.tiers import HostTier, Order

__all__ = [
    "BlockAccountingError",
    "BlockInfo",
    "HostTier",
    "KVHandle",
    "KVManager",
    "KVStats",
    "ModelIdentity",
    "Namespace",
    "Order",
]
