"""LatencyTable: what a simulation knows of a worker: its sizes, how long its steps take, and what
the way to a client costs beside them.

A JSON file. `points` are steps that were measured; more of them tell more, three will do. Knows
neither who measured nor who simulates.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError

MAX_FILE_BYTES = 256 << 20
MAX_POINTS = 200_000
MAX_MICROS = 3_600_000_000  # an hour
MAX_SPREAD = 1024  # values of a time that varies
Spread = tuple[int, ...]
SPREADS = ("step_overhead_micros", "round_trip_micros", "submit_micros", "deliver_micros")
_POINT = ("num_tokens", "num_context_tokens", "num_attended_tokens", "num_sampled", "micros")


def _size(default: int, low: int, high: int) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Times in microseconds."""

    # who the worker says it is
    model: str = "simulated"
    model_digest: str = "00" * 16  # hex
    dtype: str = "float32"
    kv_dtype: str = "float32"
    # its sizes
    block_size: int = _size(16, 1, 1024)
    num_blocks: int = _size(4096, 2, 1 << 30)  # the null block 0 included
    block_bytes: int = _size(1024, 1, 1 << 40)
    num_host_blocks: int = _size(0, 0, 1 << 30)
    max_slots: int = _size(288, 1, 1 << 16)
    max_model_len: int = _size(4096, 2, 1 << 24)
    vocab_size: int = _size(32000, 4, 1 << 24)
    eos_token_id: int = _size(2, 0, (1 << 24) - 1)
    eos_every: int = _size(0, 0, 1 << 30)  # a stream meets EOS once in so many tokens; 0 = never
    # its times
    points: tuple[tuple[float, ...], ...] = ()  # as _POINT has them
    copy_micros: int = _size(20, 0, MAX_MICROS)  # one block to or from the host tier
    deliver_row_micros: int = _size(0, 0, MAX_MICROS)  # each further token of a step, to its client
    # Times that vary: values, each as likely as another; one value is a constant.
    step_overhead_micros: Spread = (0,)  # between two steps that follow closely
    round_trip_micros: Spread = (0,)  # plan sent -> result there, without the step
    submit_micros: Spread = (0,)  # client -> scheduler, tokenising included
    deliver_micros: Spread = (0,)  # a step's first token: result -> client

    @classmethod
    def constant(cls, micros: float, **sizes: Any) -> LatencyTable:
        """Every step takes as long."""
        points = tuple((n, n, n, n, micros) for n in (1, 1 << 20))
        return cls(points=tuple(tuple(map(float, p)) for p in points), **sizes).check()

    def sized(self, config: EngineConfig) -> LatencyTable:
        """As a worker with these settings would be: as much KV memory as was measured, unless they
        say how much, in blocks of their size. Raises ConfigError."""
        block_bytes = max(self.block_bytes * config.block_size // self.block_size, 1)
        num_blocks = 1 + (self.num_blocks - 1) * self.block_size // config.block_size
        if config.num_gpu_blocks_override:
            num_blocks = config.num_gpu_blocks_override
        elif config.kv_cache_memory_bytes:
            num_blocks = config.kv_cache_memory_bytes // block_bytes
        num_host_blocks = self.num_host_blocks * self.block_size // config.block_size
        if config.host_cache_memory:
            num_host_blocks = config.host_cache_memory // block_bytes
        length = min(config.max_model_len or self.max_model_len, self.max_model_len)
        return dataclasses.replace(
            self,
            block_size=config.block_size,
            block_bytes=block_bytes,
            num_blocks=max(num_blocks, 2),
            num_host_blocks=num_host_blocks,
            copy_micros=max(self.copy_micros * config.block_size // self.block_size, 1),
            max_slots=config.max_num_seqs + max(4, config.max_num_seqs // 8),
            max_model_len=min(length, (max(num_blocks, 2) - 1) * config.block_size),
        ).check()

    def check(self) -> LatencyTable:
        """Self, or ConfigError naming the field, the value and the bounds."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "low" in f.metadata:
                low, high = f.metadata["low"], f.metadata["high"]
                if type(value) is not int or not low <= value <= high:
                    raise ConfigError(
                        f"latency table: {f.name} must be an integer between {low} and {high}, "
                        f"not {value!r}."
                    )
            elif f.name in SPREADS:
                _check_spread(f.name, value)
            elif f.name != "points" and not (isinstance(value, str) and len(value) <= 1024):
                raise ConfigError(f"latency table: {f.name} must be a short text, not {value!r}.")
        try:
            bytes.fromhex(self.model_digest)
        except ValueError:
            raise ConfigError(
                f"latency table: model_digest {self.model_digest!r} is not hexadecimal."
            ) from None
        if self.eos_token_id >= self.vocab_size:
            raise ConfigError(
                f"latency table: eos_token_id {self.eos_token_id} is not below vocab_size "
                f"{self.vocab_size}."
            )
        if not 1 <= len(self.points) <= MAX_POINTS:
            raise ConfigError(
                f"latency table: {len(self.points)} points; expected 1 to {MAX_POINTS}."
            )
        return self

    def to_json(self) -> str:
        """The file's text: one point a line."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        points = values.pop("points")
        lines = [f' "{name}": {json.dumps(value)},' for name, value in values.items()]
        rows = [
            json.dumps({k: _short(v) for k, v in zip(_POINT, point, strict=True)})
            for point in points
        ]
        return "\n".join(["{", *lines, ' "points": [', "  " + ",\n  ".join(rows), " ]", "}", ""])


def read(path: str) -> LatencyTable:
    """The table in a file. Raises ConfigError that says where it is wrong."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size} bytes are no latency table.")
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"latency table {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"latency table {path} is not valid JSON: {error}.") from None
    try:
        return from_json(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def from_json(tree: Any) -> LatencyTable:
    """A table from what JSON gave. Raises ConfigError."""
    if not isinstance(tree, dict):
        raise ConfigError("latency table: expected an object with 'points'.")
    known = {f.name for f in dataclasses.fields(LatencyTable)}
    for key in tree:
        if key not in known:
            raise ConfigError(f"latency table: unknown field {key!r}.")
    rows = tree.get("points")
    if not isinstance(rows, list):
        raise ConfigError("latency table: 'points' must be a list of measured steps.")
    if len(rows) > MAX_POINTS:
        raise ConfigError(f"latency table: {len(rows)} points; expected 1 to {MAX_POINTS}.")
    points = tuple(_point(i, row) for i, row in enumerate(rows))
    spreads = {name: tuple(_listed(tree[name])) for name in SPREADS if name in tree}
    return LatencyTable(**{**tree, **spreads, "points": points}).check()


def spread(micros: Sequence[float]) -> Spread:
    """Measured times as a few values, each as likely as another: their quantiles, 0 at least."""
    if not len(micros):
        return (0,)
    count = min(len(micros), 201)
    at = sorted(micros)
    picked = [at[min((2 * i + 1) * len(at) // (2 * count), len(at) - 1)] for i in range(count)]
    return tuple(min(max(int(value), 0), MAX_MICROS) for value in picked)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_spread(name: str, values: Spread) -> None:
    right = 1 <= len(values) <= MAX_SPREAD
    if not right or any(type(v) is not int or not 0 <= v <= MAX_MICROS for v in values):
        raise ConfigError(
            f"latency table: {name} must be an integer between 0 and {MAX_MICROS}, or a list of 1 "
            f"to {MAX_SPREAD} such, not {str(values)[:80]}."
        )


def _point(index: int, row: Any) -> tuple[float, ...]:
    if not isinstance(row, Mapping):
        raise ConfigError(f"latency table: points[{index}] is no object.")
    for key in row:
        if key not in _POINT:
            raise ConfigError(f"latency table: points[{index}] has an unknown field {key!r}.")
    tokens, micros = row.get("num_tokens", 0), row.get("micros", 0)
    filled = {
        "num_context_tokens": tokens,
        "num_attended_tokens": tokens,
        "num_sampled": 1,
        **row,
    }
    values = [filled.get(name, 0) for name in _POINT]
    for name, value in zip(_POINT, values, strict=True):
        high = MAX_MICROS if name == "micros" else 1 << 53
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not (right and math.isfinite(value) and 0 <= value <= high):
            raise ConfigError(
                f"latency table: points[{index}].{name} must be a number between 0 and {high}, "
                f"not {value!r}."
            )
    if tokens < 1 or micros <= 0:
        raise ConfigError(
            f"latency table: points[{index}] needs num_tokens of at least 1 and micros above 0."
        )
    return tuple(float(v) for v in values)


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 3)
