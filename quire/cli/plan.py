"""What `quire serve` would start: model, device, addresses, each checked before loading.

Decides and checks; starts nothing. Imports no tensor library.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from quire import hub
from quire.cli import machine
from quire.cli.checkpoint import Checkpoint, inspect
from quire.config import EngineConfig, Resolved, flag
from quire.errors import AddressInUse, ConfigError, ModelError, ResourceError

DEVICES = ("auto", "cpu", "cuda")
SUFFICES = 64 << 20  # bytes a process needs beside its weights, at the very least


@dataclass(frozen=True)
class Plan:
    """A start that has passed its checks. `config` is what the children get."""

    config: EngineConfig
    checkpoint: Checkpoint
    device: str
    notes: tuple[str, ...] = ()  # what was changed, to be told

    @property
    def threads(self) -> int:
        return self.config.num_threads or machine.cores()

    @property
    def where(self) -> str:
        """'cpu, 2 threads' or 'cuda'."""
        if self.device != "cpu":
            return self.device
        return f"cpu, {self.threads} thread{'s' if self.threads != 1 else ''}"

    def table(self) -> str:
        """What --dry-run prints; the same command line gives the same text."""
        config, found = self.config, self.checkpoint
        dtype = found.dtype if config.dtype == "auto" else config.dtype
        size = readable(found.loaded_bytes(config.dtype))
        length = config.max_model_len or found.max_model_len
        device = f"{self.where}{' (chosen by auto)' if config.device == 'auto' else ''}"
        rows = {
            "model": f"{', '.join(config.model_names)} from {found.folder}",
            "architecture": found.architecture,
            "parameters": f"{found.num_parameters:,} ({size})",
            "dtype": dtype + (" (the checkpoint's)" if config.dtype == "auto" else ""),
            "context": f"{length:,} tokens" if length else "the model's",
            "device": device,
            "gateway": url(config),
            "scheduler": f"gRPC {config.engine_address}, steps {config.step_address}"
            + _metrics(config.scheduler_metrics_port),
            "worker": f"rank 0 of {config.tensor_parallel_size}"
            + _metrics(config.worker_metrics_port),
        }
        return "\n".join([*(f"{name:<13}{text}" for name, text in rows.items()), *self.notes])


def make(resolved: Resolved) -> Plan:
    """Check port, paths, model files and memory, in the order of what they cost.

    Raises a StartupError that says what is wrong and what to do.
    """
    config = _gateway_address(resolved.config)
    device = _device(config)
    if config.chat_template and not Path(config.chat_template).expanduser().is_file():
        raise ConfigError(f"--chat-template {config.chat_template}: no such file.")
    if config.journal:
        journal = Path(config.journal).expanduser().absolute()
        if not journal.parent.is_dir():
            raise ConfigError(f"--journal {config.journal}: {journal.parent} does not exist.")
        if journal.exists() and not journal.is_dir():
            raise ConfigError(f"--journal {config.journal} is a file; name a folder.")
    config, notes = _inner_addresses(config, resolved)
    folder = hub.resolve(config.model, config.revision or None)
    found = inspect(folder, config.tokenizer)
    _known(found)
    if device == "cpu":
        _fits(config, found)
    return Plan(config, found, device, tuple(notes))


def url(config: EngineConfig) -> str:
    """Where a client on this machine finds the gateway."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def readable(size: int) -> str:
    """'6.3 MiB'."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1024:.0f} KiB"


def _metrics(port: int) -> str:
    return f", metrics {port}" if port else ""


def _device(config: EngineConfig) -> str:
    kind = config.device.partition(":")[0]
    if kind not in DEVICES:
        raise ConfigError(f"--device {config.device!r} is not one of {', '.join(DEVICES)}.")
    if kind != "auto":
        return config.device
    return "cuda" if machine.has_gpu() else "cpu"


def _gateway_address(config: EngineConfig) -> EngineConfig:
    """With a port in place of 0. Raises AddressInUse naming who holds it."""
    try:
        if config.port == 0:
            return dataclasses.replace(config, port=machine.free_port(config.host or "0.0.0.0"))
        if machine.port_is_free(config.host, config.port):
            return config
    except OSError as error:
        raise ConfigError(
            f"can't listen on --host {config.host!r} --port {config.port}: {error.strerror}."
        ) from None
    raise AddressInUse(_busy("port", config.port, "--port"))


def _busy(what: str, port: int, name: str) -> str:
    holder = machine.holder_of(port)
    return (
        f"{what} {port} is taken{f' by {holder}' if holder else ''}; "
        f"stop it, or choose another with {name}."
    )


def _inner_addresses(config: EngineConfig, resolved: Resolved) -> tuple[EngineConfig, list[str]]:
    """Default addresses between the services move when they are taken; given ones do not."""
    notes = []
    taken = {config.port}
    for name in ("engine_address", "step_address", "scheduler_metrics_port", "worker_metrics_port"):
        value = getattr(config, name)
        host, port = _host_port(name, value) if isinstance(value, str) else (config.host, value)
        if port == 0 and not isinstance(value, str):
            continue  # no metrics page wanted
        try:
            free = port not in taken and machine.port_is_free(host, port)
        except OSError as error:
            raise ConfigError(f"{flag(name)} {value}: {error.strerror}.") from None
        if not free:
            if not resolved.is_default(name):
                raise AddressInUse(_busy(f"{name.replace('_', ' ')}:", port, flag(name)))
            old, port = port, machine.free_port(host or "127.0.0.1")
            value = f"{host}:{port}" if isinstance(value, str) else port
            changed: dict[str, Any] = {name: value}
            config = dataclasses.replace(config, **changed)
            notes.append(f"Port {old} is taken; {name.replace('_', ' ')} is {value} instead.")
        taken.add(port)
    return config, notes


def _host_port(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{flag(name)} {address!r}: expected host:port, as 127.0.0.1:50051.")
    return host.strip("[]"), int(port)


def _known(found: Checkpoint) -> None:
    """Raise ModelError for an architecture that no worker here has code for."""
    try:
        registry = import_module("quire_worker.models.registry")
    except ImportError:  # an installation without the worker: the worker itself will say
        return
    plugins = {point.name for point in entry_points(group=registry.ENTRY_POINT_GROUP)}
    known = {*registry.ARCHITECTURES, *plugins}
    if not known & set(found.architectures):
        raise ModelError(
            f"{found.folder / 'config.json'}: unknown architecture "
            f"{', '.join(found.architectures)[:200]}; supported: {', '.join(sorted(known))}. "
            "Serve one of these, or install a package that adds it."
        )


def _fits(config: EngineConfig, found: Checkpoint) -> None:
    free = machine.free_memory()
    weights = found.loaded_bytes(config.dtype)
    if free is None or weights + config.kv_cache_memory_bytes + SUFFICES <= free:
        return
    if weights + SUFFICES > free:
        cure = "free some memory, or take a smaller model"
        if found.dtype == "float32" and config.dtype == "auto":
            cure += " or --dtype bfloat16"
        raise ResourceError(
            f"the weights need {readable(weights)} and {readable(free)} is free; {cure}."
        )
    most = max((free - weights - SUFFICES) >> 20, 1)
    raise ResourceError(
        f"the weights need {readable(weights)} and --kv-cache-memory-bytes asks for "
        f"{readable(config.kv_cache_memory_bytes)}, but {readable(free)} is free; "
        f"at most {most}MiB would fit."
    )
