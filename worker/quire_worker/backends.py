"""Devices, cores and memory of this machine, as far as this process may use them.

Knows the operating system and torch's device names; no models. Importing this module does not
import torch, because `prepare_threads` must run before torch does: OpenMP reads its settings once.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEEP_BYTES = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number where there is no limit


def resolve_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N -> torch.device. ConfigError for another name, ResourceError when
    it is absent.
    """
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()) or name.endswith(":"):
        raise ConfigError(
            f"--device {name} is not supported; choose auto, cpu or cuda (cuda:1 for the second "
            "GPU)"
        )
    if not torch.cuda.is_available():
        built = "has no CUDA support" if torch.version.cuda is None else "finds no usable GPU"
        raise ResourceError(
            f"--device {name}: this torch ({torch.__version__}) {built}; use --device cpu or auto"
        )
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ResourceError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
        )
    return torch.device("cuda", index)


def available_cores() -> int:
    """Cores this process may run on at once: affinity, cut by the cgroup's CPU quota (rounded up);
    at least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota(_CGROUP)
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time the cgroup grants, from cgroup v2 (cpu.max) or v1; None = no limit."""
    text = _read(root / "cpu.max")
    if text is not None:
        granted, _, every = text.partition(" ")
        return None if granted == "max" else int(granted) / int(every or 100000)
    limit, period = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    if limit is None or period is None or int(limit) <= 0:
        return None
    return int(limit) / int(period)


def free_memory_bytes() -> int:
    """Memory this process could still take: the machine's available memory, cut by what the cgroup
    has left.
    """
    available = _meminfo_available()
    left = cgroup_memory_left(_CGROUP)
    return available if left is None else max(0, min(available, left))


def cgroup_memory_left(root: Path) -> int | None:
    """Limit - use + page cache that can be dropped, of cgroup v2 or v1; None = no limit."""
    for folder, limit_name, use_name in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, use = _read(folder / limit_name), _read(folder / use_name)
        if limit is None or use is None:
            continue
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        return int(limit) - int(use) + int(stat.get("inactive_file", 0))
    return None


def prepare_threads(num_threads: int = 0) -> int:
    """Set OpenMP's environment for `num_threads` (0 = all cores allowed) and return the number.
    Call before torch loads.

    Waiting threads sleep after a short spin: scheduler and gateway share these cores, and a team
    whose members spin while one of them is preempted stalls for whole scheduler ticks. What the
    user has set in the environment stays.
    """
    count = num_threads or int(os.environ.get("OMP_NUM_THREADS", "0") or 0) or available_cores()
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ.setdefault("MKL_NUM_THREADS", str(count))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # some microseconds
    os.environ.setdefault("OMP_DYNAMIC", "false")
    os.environ.setdefault("MKL_DYNAMIC", "false")
    if "torch" in sys.modules:  # in-process use: too late for the environment, not for the number
        sys.modules["torch"].set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Let glibc keep what is freed from now on. By default it gives large buffers back to the
    kernel, or not, as the heap happens to lie: then each step takes them page by page anew
    (250,000 faults and a third of the time of a step behind 1,500 tokens, 0.6 B parameters).
    Elsewhere nothing happens. Call after loading, whose buffers are not needed again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)


def _meminfo_available() -> int:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
