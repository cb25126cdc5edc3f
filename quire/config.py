"""EngineConfig: every setting, in one frozen dataclass, from one table.

This is the only module that reads flags, environment and TOML. Each field is a flag
(`--max-num-seqs`), a variable (`QUIRE_MAX_NUM_SEQS`) and a TOML key (`[scheduler]
max_num_seqs`); flag > environment > file > default. Names are vLLM's where it has one;
other spellings live in the alias tables at the end. Knows no service.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.errors import ConfigError


# -- how a value is read ------------------------------------------------------------------
def _int(text: str) -> int:
    return int(text.replace("_", ""))


def _count(text: str) -> int:
    """An integer that may end in k (1,000) or K/Ki (1,024), as 32k or 32K; 'auto' is 0."""
    if text.lower() == "auto":
        return 0
    match = re.fullmatch(r"(\d[\d_]*)(k|K|Ki)?", text)
    if not match:
        raise ValueError("expected an integer such as 4096, 32k, or auto")
    return int(match[1].replace("_", "")) * {"k": 1000, "K": 1024, "Ki": 1024, None: 1}[match[2]]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def _size(text: str) -> int:
    """Bytes: a number, or one with a unit as 4GiB, 512MB, 2g."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not match:
        raise ValueError("expected a size such as 4GiB, 512MB or a number of bytes")
    unit = match[2] or ""
    return int(float(match[1]) * (_BINARY.get(unit) or _UNITS[unit]))


def _bool(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_READERS: dict[str, Callable[[str], Any]] = {
    "int": _int,
    "count": _count,
    "size": _size,
    "float": float,
    "bool": _bool,
    "str": str,
    "list": _list,
}


def opt(
    default: Any,
    section: str,
    help: str,
    *,
    kind: str = "",
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    common: bool = False,
    secret: bool = False,
) -> Any:
    """One setting. kind: a key of _READERS (from the default's type when left out); low/high:
    bounds, both included; common: shown by the short --help; secret: never printed."""
    kind = kind or {tuple: "list"}.get(type(default), type(default).__name__)
    return field(
        default=default,
        metadata={
            "section": section, "help": help, "kind": kind, "choices": tuple(choices),
            "low": low, "high": high, "common": common, "secret": secret,
        },
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All settings of all services; each service reads its own. Checked by `check()`."""

    # [model]
    model: str = opt("demo", "model", "folder, hub id, or the embedded 'demo'", common=True)
    revision: str = opt("", "model", "hub revision: branch, tag or commit")
    served_model_name: tuple[str, ...] = opt(
        (), "model", "name(s) clients use; default: what --model says", common=True
    )
    tokenizer: str = opt("", "model", "folder of another tokenizer; default: the model's")
    chat_template: str = opt("", "model", "file with a chat template; default: the model's")
    generation_config: str = opt(
        "auto", "model", "take sampling defaults from the model", choices=("auto", "none")
    )
    dtype: str = opt(
        "auto", "model", "weights and activations; auto = the checkpoint's", common=True,
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    max_model_len: int = opt(
        0, "model", "context length in tokens (32k, auto)", kind="count", low=0, high=1 << 24,
        common=True,
    )  # fmt: skip

    # [server]
    host: str = opt("127.0.0.1", "server", "address the gateway listens on", common=True)
    port: int = opt(8000, "server", "port the gateway listens on", low=0, high=65535, common=True)
    api_key: tuple[str, ...] = opt((), "server", "key(s) clients must send", secret=True)
    max_body_bytes: int = opt(
        8 << 20, "server", "largest request body", kind="size", low=1024, high=1 << 30
    )
    max_prompts: int = opt(
        128, "server", "largest number of prompts in one request", low=1, high=4096
    )
    keep_alive_interval: float = opt(
        15.0, "server", "seconds of silence before ': keep-alive' in a stream; 0 = never",
        low=0, high=3600,
    )  # fmt: skip
    reconnect_timeout: float = opt(
        30.0, "server", "seconds a request waits for a lost scheduler", low=0, high=3600
    )
    drain_timeout: float = opt(
        30.0, "server", "seconds running requests get after SIGTERM", low=0, high=86400
    )
    engine_address: str = opt(
        "127.0.0.1:50051", "server", "gRPC: scheduler listens, gateway connects"
    )

    # [scheduler]
    max_num_seqs: int = opt(
        256, "scheduler", "most requests in one step", low=1, high=16_384, common=True
    )
    max_num_batched_tokens: int = opt(
        0, "scheduler", "most tokens in one step; auto = what takes 250 ms", kind="count",
        low=0, high=1 << 20, common=True,
    )  # fmt: skip
    max_waiting: int = opt(
        4096, "scheduler", "most requests that wait; more get 429", low=0, high=1 << 20
    )
    max_requests: int = opt(
        0, "scheduler", "most requests in all, running and waiting; 0 = no such limit",
        low=0, high=1 << 20,
    )  # fmt: skip
    scheduling_policy: str = opt(
        "fcfs", "scheduler", "order of waiting requests", choices=("fcfs", "priority")
    )
    enable_chunked_prefill: bool = opt(True, "scheduler", "spread a long prompt over steps")
    itl_target_ms: float = opt(
        0.0, "scheduler", "pace that prompts leave to running streams, in ms a token; 0 = any",
        low=0, high=60_000, common=True,
    )  # fmt: skip
    journal: str = opt("", "scheduler", "folder that every plan and result is recorded in")
    journal_privacy: str = opt(
        "full", "scheduler", "prompts in the journal; only full can be replayed",
        choices=("full", "hashed", "none"),
    )  # fmt: skip
    journal_max_bytes: int = opt(
        1 << 30, "scheduler", "size of the journal; the oldest part goes first", kind="size",
        low=1 << 20, high=1 << 46,
    )  # fmt: skip
    step_address: str = opt(
        "127.0.0.1:5557", "scheduler", "ZeroMQ: scheduler listens, workers connect"
    )
    scheduler_metrics_port: int = opt(
        9101, "scheduler", "scheduler's own metrics page; 0 = none", low=0, high=65535
    )

    # [cache]
    block_size: int = opt(16, "cache", "tokens in a KV block", low=1, high=1024)
    enable_prefix_caching: bool = opt(
        True, "cache", "share KV blocks of equal prefixes", common=True
    )
    eviction_policy: str = opt(
        "lru", "cache", "which cached block goes first", choices=("lru", "lfu", "fifo")
    )
    kv_cache_memory_bytes: int = opt(
        0, "cache", "size of the KV pool (4GiB, 512MB); 0 = from free memory", kind="size",
        low=0, high=1 << 46, common=True,
    )  # fmt: skip
    gpu_memory_utilization: float = opt(
        0.9, "cache", "share of the GPU's memory for weights and KV", low=0.05, high=1.0,
        common=True,
    )  # fmt: skip
    num_gpu_blocks_override: int = opt(
        0, "cache", "number of KV blocks; 0 = from the memory", low=0, high=1 << 30
    )
    host_cache_memory: int = opt(
        0, "cache", "host memory for KV blocks the device has no room for (8GiB)",
        kind="size", low=0, high=1 << 46, common=True,
    )  # fmt: skip
    kv_name_key: str = opt("", "cache", "key in the names of KV blocks", secret=True)

    # [worker]
    device: str = opt("auto", "worker", "auto, cpu or cuda", common=True)
    tensor_parallel_size: int = opt(
        1, "worker", "devices that share each layer; this version: 1", low=1, high=1
    )
    num_threads: int = opt(
        0, "worker", "CPU threads of a worker; 0 = from affinity and quota", low=0, high=1024
    )
    worker_metrics_port: int = opt(
        9102, "worker", "worker's own metrics page, plus its rank; 0 = none", low=0, high=65535
    )

    # [observability]
    log_level: str = opt(
        "info", "observability", "how much is logged", common=True,
        choices=("debug", "info", "warning", "error"),
    )  # fmt: skip
    log_format: str = opt(
        "text", "observability", "how a line looks", choices=("text", "json"), common=True
    )
    otlp_traces_endpoint: str = opt("", "observability", "OTLP/gRPC address for traces")

    def check(self) -> EngineConfig:
        """Self, or ConfigError naming the flag, the value and the bounds."""
        for f in settings():
            _bounded(f, getattr(self, f.name))
        if self.itl_target_ms and not self.enable_chunked_prefill:
            raise ConfigError(
                "--itl-target-ms holds by cutting prompts into chunks; "
                "leave --enable-chunked-prefill on, or take the target away."
            )
        if self.host_cache_memory and not self.enable_prefix_caching:
            raise ConfigError(
                "--host-cache-memory keeps blocks that the prefix cache lets go; "
                "leave --enable-prefix-caching on, or give --host-cache-memory 0."
            )
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients may ask for; the first is the one answers carry."""
        return self.served_model_name or (self.model,)


def settings() -> tuple[dataclasses.Field[Any], ...]:
    """The fields of EngineConfig, in order; `metadata` holds what opt() was given."""
    return dataclasses.fields(EngineConfig)


def from_settings(settings_: Mapping[str, Any]) -> EngineConfig:
    """A config from Python values, as the Python API takes them: field names or their aliases,
    values of the field's type or text as a flag would have it ("4GiB"). Raises ConfigError."""
    values: dict[str, Any] = {}
    for key, value in settings_.items():
        name = FLAG_ALIASES.get(key, key)
        if name not in _FIELDS:
            raise ConfigError(f"unknown setting {key!r}.{_nearest(key, _FIELDS)}")
        kind = _kind_of(name)
        if isinstance(value, str) and kind != "str":
            value = _read(name, value, key)
        elif kind == "list" and isinstance(value, list):
            value = tuple(value)
        elif kind == "str" and isinstance(value, os.PathLike):
            value = os.fspath(value)
        values[name] = value
    return EngineConfig(**values).check()


def flag(name: str) -> str:
    """'max_num_seqs' -> '--max-num-seqs'."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """'max_num_seqs' -> 'QUIRE_MAX_NUM_SEQS'."""
    return "QUIRE_" + name.upper()


def _bounded(f: dataclasses.Field[Any], value: Any) -> None:
    meta = f.metadata
    expected: Any = {
        "int": int, "count": int, "size": int, "float": (int, float), "bool": bool, "str": str,
        "list": tuple,
    }[meta["kind"]]  # fmt: skip
    if not isinstance(value, expected) or (isinstance(value, bool) and meta["kind"] != "bool"):
        raise ConfigError(f"{flag(f.name)}: {value!r} is not of type {meta['kind']}.")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{flag(f.name)}: {value!r} is not one of {', '.join(meta['choices'])}.")
    low, high = meta["low"], meta["high"]
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{flag(f.name)} must be between {low:g} and {high:g}, not {value}.")


# -- where values come from ---------------------------------------------------------------
@dataclass(frozen=True)
class Resolved:
    """A config and, for each field, where its value came from."""

    config: EngineConfig
    sources: Mapping[str, str]  # field -> 'default' | 'flag --port' | 'env QUIRE_PORT' | 'file x'

    def is_default(self, name: str) -> bool:
        return self.sources[name] == "default"

    def table(self) -> str:
        """What --print-config prints: one 'name = value  (source)' a line."""
        lines = []
        for f in settings():
            value = getattr(self.config, f.name)
            if f.metadata["secret"] and value:
                value = "***"
            lines.append(f"{f.name} = {value!r}  ({self.sources[f.name]})")
        return "\n".join(lines)


def resolve(
    flags: Mapping[str, str], environ: Mapping[str, str] | None = None, file: str | None = None
) -> Resolved:
    """Merge flags (as split by `split_flags`) over environment over file over defaults.

    Raises ConfigError for unknown keys and values out of bounds, with a suggestion.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources = {f.name: "default" for f in settings()}
    file = file or environ.get("QUIRE_CONFIG")
    for layer in (_from_file(file), _from_environ(environ), _from_flags(flags)):
        for name, (value, source) in layer.items():
            values[name] = value
            sources[name] = source
    return Resolved(EngineConfig(**values).check(), sources)


Layer = dict[str, tuple[Any, str]]


def _read(name: str, text: str, source: str) -> Any:
    f = _FIELDS[name]
    try:
        return _READERS[f.metadata["kind"]](text)
    except ValueError as error:
        reason = str(error) if str(error).startswith("expected") else f"not a {f.metadata['kind']}"
        raise ConfigError(f"{source}: can't use {text!r}: {reason}.") from None


def _from_flags(flags: Mapping[str, str]) -> Layer:
    return {n: (_read(n, text, flag(n)), f"flag {flag(n)}") for n, text in flags.items()}


def _from_environ(environ: Mapping[str, str]) -> Layer:
    layer: Layer = {}
    for key, alias in ENV_ALIASES.items():
        if key in environ:
            layer[alias.name] = (_read(alias.name, environ[key] + alias.suffix, key), f"env {key}")
    for key, text in environ.items():
        if not key.startswith("QUIRE_") or key in NOT_SETTINGS:
            continue
        name = key.removeprefix("QUIRE_").lower()
        name = FLAG_ALIASES.get(name, name)
        if name not in _FIELDS:
            near = _nearest(variable(name), [variable(n) for n in _FIELDS])
            raise ConfigError(f"unknown variable {key}.{near}")
        layer[name] = (_read(name, text, key), f"env {key}")
    return layer


def _from_file(path: str | None) -> Layer:
    if not path:
        return {}
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}.") from None
    layer: Layer = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{path}: key {section!r} must stand in a section such as [server].")
        for key, value in keys.items():
            name, suffix = _file_name(path, section, key)
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            source = f"file {path} [{section}] {key}"
            layer[name] = (_read(name, text + suffix, source), source)
    return layer


def _file_name(path: str, section: str, key: str) -> tuple[str, str]:
    alias = FILE_ALIASES.get((section, key))
    if alias:
        return alias.name, alias.suffix
    name = FLAG_ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
    if name in _FIELDS and _FIELDS[name].metadata["section"] == section:
        return name, ""
    if name in _FIELDS:
        raise ConfigError(
            f"{path}: {key!r} belongs in section [{_FIELDS[name].metadata['section']}], "
            f"not [{section}]."
        )
    sections = {f.metadata["section"] for f in settings()}
    if section not in sections:
        raise ConfigError(f"{path}: unknown section [{section}].{_nearest(section, sections)}")
    raise ConfigError(f"{path}: unknown key {key!r} in [{section}].{_nearest(key, _FIELDS)}")


def split_flags(args: Sequence[str], also: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Split a command line into settings {field: text} and the positional rest.

    Takes --name value, --name=value, and for switches --name and --no-name. A list may be
    given several times. Raises ConfigError with a suggestion for a flag it does not know;
    `also`: flags of the command itself, which may be suggested too.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += words
            break
        if not word.startswith("-") or word == "-" or re.fullmatch(r"-\d.*", word):
            rest.append(word)
            continue
        key, has_value, text = word.partition("=")
        name = _SHORT.get(key) or key.removeprefix("--").replace("-", "_")
        negated = False
        if name in NEGATED:
            name, negated = NEGATED[name], True
        elif name.startswith("no_") and _kind_of(name[3:]) == "bool":
            name, negated = name[3:], True
        name = FLAG_ALIASES.get(name, name)
        if name not in _FIELDS or not (key.startswith("--") or key in _SHORT):
            known = [*also, *(flag(n) for n in (*_FIELDS, *FLAG_ALIASES))]
            raise ConfigError(f"unknown flag {key}.{_nearest(key, known)}")
        if _kind_of(name) == "bool":
            value = _bool(text) if has_value else True
            found[name] = str(value != negated)
            continue
        if not has_value:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{key} needs a value: {_FIELDS[name].metadata['help']}.")
            text = words.pop(0)
        if _kind_of(name) == "list":
            found[name] = f"{found[name]},{text}" if name in found else text
            continue
        found[name] = text
    return found, rest


def _kind_of(name: str) -> str:
    f = _FIELDS.get(FLAG_ALIASES.get(name, name))
    return f.metadata["kind"] if f else ""


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


_FIELDS = {f.name: f for f in settings()}
_SHORT = {"-tp": "tensor_parallel_size", "-m": "model"}


# -- other people's spellings -------------------------------------------------------------
FLAG_ALIASES = {
    "num_blocks": "num_gpu_blocks_override",
    "kvcache_block_size": "block_size",
    "max_sequence_length": "max_model_len",
    # SGLang
    "model_path": "model",
    "tokenizer_path": "tokenizer",
    "tp_size": "tensor_parallel_size",
    "tp": "tensor_parallel_size",
    "context_length": "max_model_len",
    "mem_fraction_static": "gpu_memory_utilization",
    "max_running_requests": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "max_queued_requests": "max_waiting",
    "page_size": "block_size",
    "schedule_policy": "scheduling_policy",
    "radix_eviction_policy": "eviction_policy",
}
NEGATED = {"disable_radix_cache": "enable_prefix_caching"}


@dataclass(frozen=True)
class Alias:
    """Another name of a field; `suffix` is a unit the other name implies."""

    name: str
    suffix: str = ""


ENV_ALIASES = {
    "LLM_ENGINE_HOST": Alias("host"),
    "LLM_ENGINE_PORT": Alias("port"),
    "LLM_ENGINE_API_KEY": Alias("api_key"),
    "LLM_ENGINE_MODEL_PATH": Alias("model"),
    "LLM_ENGINE_DEVICE": Alias("device"),
    "LLM_ENGINE_MAX_SEQUENCE_LENGTH": Alias("max_model_len"),
    "LLM_ENGINE_CACHE_ENABLED": Alias("enable_prefix_caching"),
    "LLM_ENGINE_CACHE_SIZE_MB": Alias("kv_cache_memory_bytes", "MiB"),
    "LLM_ENGINE_LOG_LEVEL": Alias("log_level"),
}
FILE_ALIASES = {
    ("server", "max_concurrent_requests"): Alias("max_requests"),
    ("model", "name"): Alias("served_model_name"),
    ("model", "model_path"): Alias("model"),
    ("model", "device"): Alias("device"),
    ("model", "max_sequence_length"): Alias("max_model_len"),
    ("cache", "enabled"): Alias("enable_prefix_caching"),
    ("cache", "max_size_mb"): Alias("kv_cache_memory_bytes", "MiB"),
}


def to_environ(config: EngineConfig) -> dict[str, str]:
    """The variables that give another process the same config, whatever it inherits beside."""
    found = {}
    for f in settings():
        value = getattr(config, f.name)
        if value != f.default:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            found[variable(f.name)] = text
    return found


# QUIRE_ variables that are no settings: read elsewhere, each at one place.
NOT_SETTINGS = {
    "QUIRE_CONFIG", "QUIRE_CACHE_DIR", "QUIRE_SUPERVISED", "QUIRE_PULSE_FD", "QUIRE_TEST_FAULT",
}  # fmt: skip
