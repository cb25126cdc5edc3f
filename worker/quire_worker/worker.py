"""Worker: a model, its KV pool and a runner on one device, ready to be served.

Knows no sockets: `daemon.serve` feeds it plans, from a process of its own (main.py) or from a
thread (quire.llm). Import this module only after `backends.prepare_threads`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable

import torch

from quire import hub
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.telemetry import Tracer
from quire.v1 import step_pb2 as pb
from quire.version import __version__
from quire.wire import PROTOCOL_VERSION
from quire_kernels import dispatch
from quire_worker import backends, calibrate
from quire_worker.columns import Limits
from quire_worker.kv_cache import KVCache, KVCacheSpec, plan_num_blocks
from quire_worker.loader import load_model, model_digest
from quire_worker.metrics import Metrics, resident_bytes
from quire_worker.models.config import DecoderConfig, read_config
from quire_worker.runner import Runner

log = logging.getLogger("quire.worker")

Progress = Callable[[int, int], None]  # bytes of weights loaded, bytes in all

_STATUS = {pb.STEP_STATUS_OK: "ok", pb.STEP_STATUS_FAILED: "failed"}


class Worker:
    """Loads on construction. Raises StartupError (ModelError, ResourceError, ConfigError).

    `execute` is for one thread; `hello`, `heartbeat` and `metrics.page` may be called beside it.
    """

    def __init__(
        self, config: EngineConfig, rank: int = 0, progress: Progress | None = None
    ) -> None:
        begin = time.monotonic()
        self.rank = rank
        self.fatal = ""  # why this process can't compute any more
        self.worker_epoch = secrets.randbits(63) | 1
        folder = hub.resolve(config.model, config.revision or None)
        self.device = backends.resolve_device(config.device)
        model_config = read_config(folder)
        self.model = load_model(
            folder, device=self.device, dtype=config.dtype, progress=progress,
            config=model_config, block_size=config.block_size,
        )  # fmt: skip
        self.model_name = config.model_names[0]
        self.digest = model_digest(folder)
        spec = KVCacheSpec.from_config(
            model_config, dtype=self.model.dtype, block_size=config.block_size
        )
        limits = _limits(config, model_config, spec, self.device)
        self.kv_cache = KVCache(spec, limits.num_blocks, self.device)
        self.block_bytes = spec.block_bytes
        self.tracer = Tracer("worker", config.otlp_traces_endpoint)
        self.runner = Runner(
            self.model,
            self.kv_cache,
            limits,
            self.device,
            eos_token_ids=model_config.eos_token_ids,
            worker_epoch=self.worker_epoch,
            tracer=self.tracer if config.otlp_traces_endpoint else None,
        )
        self.eos_token_ids = model_config.eos_token_ids
        self.metrics = Metrics()
        self.metrics.set_sizes(
            limits.num_blocks * spec.block_bytes,
            limits.num_host_blocks * spec.block_bytes,
            self.model.weight_bytes,
            _memory_total(self.device),
        )
        backends.keep_freed_memory()
        self.step_costs = calibrate.measure(self.runner)
        self.copy_micros = calibrate.measure_copy(self.runner)
        self.runner.memory_bytes = _memory_used(self.device)
        log.info(
            "%s on %s: %.1f M parameters, %s, %d KV blocks of %d tokens, %d on the host, "
            "ready in %.1f s",
            self.model_name, self.device_name, self.model.num_parameters / 1e6,
            _dtype_name(self.model.dtype), limits.num_blocks, limits.block_size,
            limits.num_host_blocks,
            time.monotonic() - begin,
        )  # fmt: skip

    @property
    def limits(self) -> Limits:
        return self.runner.limits

    @property
    def highest_epoch(self) -> int:
        return self.runner.gate.highest_epoch

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return self.device.type

    @property
    def system_fingerprint(self) -> str:
        """Changes when the same request may give other bits: by model, versions, kernels, dtype."""
        parts = (
            __version__, torch.__version__, self.digest.hex(), _dtype_name(self.model.dtype),
            self.device_name, torch.backends.cpu.get_cpu_capability(), self.model.numerics,
            dispatch.backend_for(self.device),
        )  # fmt: skip
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=5).hexdigest()
        return f"fp_{digest}_{self.model.numerics}"

    def hello(self) -> pb.Hello:
        """Who this is, what it holds, and the highest epoch it has seen."""
        runner, limits = self.runner, self.limits
        ids, names = runner.transfer.names.held()
        host_ids, host_names = runner.transfer.host_names.held()
        return pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            rank=self.rank,
            tp_rank=self.rank,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            worker_epoch=self.worker_epoch,
            highest_epoch=runner.gate.highest_epoch,
            last_seq=runner.gate.last_seq,
            model=self.model_name,
            model_digest=self.digest.hex(),
            dtype=_dtype_name(self.model.dtype),
            kv_dtype=_dtype_name(self.kv_cache.pool.dtype),
            block_size=limits.block_size,
            tiers=self._tiers(),
            max_slots=limits.max_slots,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            eos_token_ids=self.eos_token_ids,
            device=self.device_name,
            attention_backend=dispatch.backend_for(self.device),
            step_costs=self.step_costs,
            held_block_ids=ids,
            held_block_names=names,
            held_host_block_ids=host_ids,
            held_host_block_names=host_names,
            system_fingerprint=self.system_fingerprint,
            pid=os.getpid(),
            software_version=__version__,
        )

    def _tiers(self) -> list[pb.TierSize]:
        limits, size = self.limits, self.block_bytes
        tiers = [pb.TierSize(tier=pb.TIER_DEVICE, num_blocks=limits.num_blocks, block_bytes=size)]
        if limits.num_host_blocks:
            host = pb.TierSize(
                tier=pb.TIER_HOST, num_blocks=limits.num_host_blocks, block_bytes=size,
                copy_micros=self.copy_micros,
            )  # fmt: skip
            tiers.append(host)
        return tiers

    def execute(self, plan: pb.StepPlan, received_ns: int | None = None) -> pb.StepResult:
        """Run one plan; see Runner.execute. Never raises for what a plan says."""
        steps_before = self.runner.busy_ns
        result = self.runner.execute(plan, received_ns)
        ran = self.runner.busy_ns != steps_before
        if ran or result.status == pb.STEP_STATUS_REFUSED:
            self.metrics.observe(_STATUS.get(result.status, "refused"), self.runner.stats)
        if result.status == pb.STEP_STATUS_FAILED and self.device.type == "cuda":
            self.fatal = _device_lost(result.error)
        return result

    def heartbeat(self) -> pb.Heartbeat:
        """That this process lives, how long the step in hand has run, and the metrics page."""
        runner = self.runner
        started, now = runner.started_ns, time.monotonic_ns()
        running = now - started if started else 0
        runner.memory_bytes = _memory_used(self.device)
        self.metrics.sample_usage(runner.busy_ns + running, runner.memory_bytes)
        return pb.Heartbeat(
            epoch=runner.gate.epoch,
            last_seq=runner.gate.last_seq,
            busy_micros=running // 1000,
            metrics=self.metrics.page(),
        )

    def frame_dropped(self) -> None:
        self.metrics.frame_dropped()

    def close(self) -> None:
        """Send pending spans."""
        self.tracer.shutdown()


def _limits(
    config: EngineConfig, model: DecoderConfig, spec: KVCacheSpec, device: torch.device
) -> Limits:
    """The context and the number of blocks that model, flags and memory allow."""
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's context of "
            f"{model.max_position_embeddings} tokens; choose at most that, or auto."
        )
    num_blocks = plan_num_blocks(
        spec,
        device,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes or None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        num_gpu_blocks_override=config.num_gpu_blocks_override or None,
        max_model_len_is_auto=not config.max_model_len,
    )
    room = (num_blocks - 1) * config.block_size  # block 0 belongs to nobody
    if room < max_model_len:
        log.warning("the KV pool holds %d tokens: the context is limited to that", room)
    num_host_blocks = config.host_cache_memory // spec.block_bytes
    if config.host_cache_memory and not num_host_blocks:
        raise ConfigError(
            f"--host-cache-memory {config.host_cache_memory} holds not one KV block of "
            f"{spec.block_bytes} bytes; raise it, or give 0 for no host tier."
        )
    return Limits(
        # some to spare: a freed slot rests until the plans in flight have been answered
        max_slots=config.max_num_seqs + max(4, config.max_num_seqs // 8),
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=min(max_model_len, room),
        vocab_size=model.vocab_size,
        num_host_blocks=num_host_blocks,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_used(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return resident_bytes()


def _memory_total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_lost(error: str) -> str:
    """After most CUDA errors nothing works in the process any more; running out of memory is
    not one of them."""
    lost = "AcceleratorError" in error or ("CUDA error" in error and "out of memory" not in error)
    return f"the device is lost: {error}" if lost else ""
