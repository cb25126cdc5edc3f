"""KV pool sizes, devices, cores and free memory, from flags and from the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.errors import ConfigError, ResourceError
from quire_worker import backends
from quire_worker.kv_cache import KVCache, KVCacheSpec, plan_num_blocks

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=4, num_kv_heads=2, head_dim=32, block_size=16, dtype=torch.float32)


def blocks(**changes: Any) -> int:
    settings: dict[str, Any] = {"max_model_len": 1000, "max_num_seqs": 4}
    return plan_num_blocks(SPEC, CPU, **{**settings, **changes})


def test_a_block_is_one_contiguous_record_and_layers_are_views() -> None:
    cache = KVCache(SPEC, 5, CPU)
    assert cache.pool.shape == (5, 4, 2, 2, 16, 32)
    assert cache.pool[3].is_contiguous()
    assert cache.pool[3].nbytes == SPEC.block_bytes
    assert (cache.pool == 0).all()
    k, v = cache.layer(2)
    k[1], v[1] = 1.0, 2.0
    assert (cache.pool[1, 2, 0] == 1).all()
    assert (cache.pool[1, 2, 1] == 2).all()
    assert cache.pool.sum() == k[1].numel() * 3


def test_the_pool_is_no_larger_than_requests_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "free_memory_bytes", lambda: 1 << 40)
    assert blocks() == 63 * 4 + 1
    assert blocks(max_num_seqs=1 << 20) == (4 << 30) // SPEC.block_bytes
    monkeypatch.setattr(backends, "free_memory_bytes", lambda: 100 * SPEC.block_bytes)
    assert blocks() == 40


def test_explicit_bytes_and_blocks_win() -> None:
    assert blocks(kv_cache_memory_bytes=10 * SPEC.block_bytes + 5) == 10
    assert blocks(num_gpu_blocks_override=7, kv_cache_memory_bytes=1) == 7


def test_too_little_memory_says_what_is_needed_and_what_would_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        blocks(kv_cache_memory_bytes=10 * SPEC.block_bytes, max_model_len_is_auto=False)
    needed = 64 * SPEC.block_bytes
    for word in ("1000 tokens", "64 blocks", "10 blocks", f"{needed} bytes",
                 "--kv-cache-memory-bytes", "--max-model-len to at most 144"):  # fmt: skip
        assert word in str(caught.value)
    assert blocks(kv_cache_memory_bytes=10 * SPEC.block_bytes) == 10
    with pytest.raises(ResourceError, match="16 tokens"):
        blocks(kv_cache_memory_bytes=10)
    with pytest.raises(ResourceError, match="--num-gpu-blocks-override to at least 64"):
        blocks(num_gpu_blocks_override=63, max_model_len_is_auto=False)


def test_devices_are_resolved_or_refused_by_name() -> None:
    assert backends.resolve_device("cpu") == CPU
    assert backends.resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "mps", "cuda:", "cuda:x", "rocm", "CPU"):
        with pytest.raises(ConfigError, match=f"--device {name}"):
            backends.resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="--device cuda.*--device cpu"):
            backends.resolve_device("cuda")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_of_both_cgroup_versions(tmp_path: Path, files, expected) -> None:
    write(tmp_path, files)
    assert backends.cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 50"}, 350),
        ({"memory.max": "max", "memory.current": "700"}, None),
        ({"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"}, 800),
        ({}, None),
    ],
)
def test_memory_left_in_both_cgroup_versions(tmp_path: Path, files, expected) -> None:
    write(tmp_path, files)
    assert backends.cgroup_memory_left(tmp_path) == expected


def test_this_machine_has_cores_and_memory() -> None:
    assert backends.available_cores() >= 1
    assert backends.free_memory_bytes() > 1 << 20


def test_threads_are_settled_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\n"
        "from quire_worker import backends\n"
        "assert 'torch' not in sys.modules\n"
        "os.environ.pop('OMP_NUM_THREADS', None)\n"
        "os.environ['OMP_WAIT_POLICY'] = 'active'\n"
        "assert backends.prepare_threads(1) == 1\n"
        "assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'active', 'what the user set stays'\n"
        "import torch\n"
        "assert torch.get_num_threads() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
