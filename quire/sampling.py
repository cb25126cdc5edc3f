"""SamplingParams: how one request samples, checked in one place for every protocol.

HTTP, gRPC and the Python API all build this class, so the same value is refused with
the same words everywhere. Knows no tokenizer and no model beyond its vocabulary size.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from quire.errors import InvalidRequest
from quire.v1 import common_pb2 as pb

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = 1 << 24  # beyond any context; the model's own limit is checked later
SEED_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request; names and defaults as vLLM's, but max_tokens=None means
    "whatever the context leaves" at the wire. temperature 0 is greedy.

    Raises InvalidRequest from `check()`, which every edge calls.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

    def check(self, vocab_size: int | None = None) -> SamplingParams:
        """Return self, or raise InvalidRequest naming the field and the bounds."""
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 1 << 24)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens}).",
                "min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), SEED_MASK)
        _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_BYTES)
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size)
        _token_ids("allowed_token_ids", self.allowed_token_ids, 1 << 20, vocab_size)
        _token_ids("logit_bias", [t for t, _ in self.logit_bias], MAX_LOGIT_BIAS, vocab_size)
        for _, bias in self.logit_bias:
            _number("logit_bias", bias, -100.0, 100.0)
        return self

    def seeded(self) -> SamplingParams:
        """Self with a seed: its own as unsigned 64 bits, or a fresh one."""
        seed = secrets.randbits(64) if self.seed is None else self.seed & SEED_MASK
        return replace(self, seed=seed)

    def choice(self, index: int) -> SamplingParams:
        """The parameters of choice `index` of n: choice 0 has the seed itself, the others
        one derived from it (splitmix64 of seed and index)."""
        if self.seed is None:
            raise ValueError("choice() needs seeded() first")
        return replace(self, n=1, seed=derive_seed(self.seed, index))

    def to_proto(self) -> pb.SamplingParams:
        """The wire form. Stop strings stay behind: they are the gateway's."""
        message = pb.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            seed=None if self.seed is None else self.seed & SEED_MASK,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=[pb.LogitBias(token_id=t, bias=b) for t, b in self.logit_bias],
            allowed_token_ids=self.allowed_token_ids,
        )
        return message

    @classmethod
    def from_proto(cls, message: pb.SamplingParams) -> SamplingParams:
        """The Python form of a wire message; unset fields take the defaults, and unset
        max_tokens stays None."""
        values: dict[str, object] = {"max_tokens": None}
        for field in fields(cls):
            name = field.name
            if name not in _WIRE_NAMES:
                continue
            if name in _PRESENCE:
                if message.HasField(name):
                    values[name] = getattr(message, name)
            elif name == "logit_bias":
                values[name] = tuple((b.token_id, b.bias) for b in message.logit_bias)
            elif name in ("stop_token_ids", "allowed_token_ids"):
                values[name] = tuple(getattr(message, name))
            else:
                values[name] = getattr(message, name)
        return cls(**values)  # type: ignore[arg-type]


_WIRE_NAMES = {f.name for f in pb.SamplingParams.DESCRIPTOR.fields}
_PRESENCE = {f.name for f in pb.SamplingParams.DESCRIPTOR.fields if f.has_presence}


def derive_seed(seed: int, index: int) -> int:
    """Seed of choice `index`: the seed itself for 0, else splitmix64(seed + index * golden)
    (Steele et al., OOPSLA 2014), so that choices are independent and reproducible."""
    if index == 0:
        return seed
    z = (seed + index * _GOLDEN) & SEED_MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return z ^ (z >> 31)


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{name} must be a number, not {_kind(value)}.", name)
    # compared before isfinite: an int may be too large for a float; NaN compares false
    if not low <= value <= high or (above and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise InvalidRequest(f"{name} must be {bounds}, not {_short(value)}.", name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, not {_kind(value)}.", name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, not {_short(value)}.", name)


def _strings(name: str, values: object, count: int, size: int) -> None:
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise InvalidRequest(f"{name} must be a string or a list of strings.", name)
    if len(values) > count:
        raise InvalidRequest(f"{name} has {len(values)} strings; at most {count} are taken.", name)
    for value in values:
        if not value:
            raise InvalidRequest(f"{name} must not hold an empty string.", name)
        if len(value.encode("utf-8", "surrogatepass")) > size:
            raise InvalidRequest(f"{name} holds a string of more than {size} bytes.", name)


def _token_ids(name: str, values: object, count: int, vocab_size: int | None) -> None:
    if not isinstance(values, (list, tuple)):
        raise InvalidRequest(f"{name} must be a list of token ids.", name)
    if len(values) > count:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {count} are taken.", name)
    high = (vocab_size or (1 << 31)) - 1
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise InvalidRequest(
                f"{name} must hold token ids between 0 and {high}, not {_short(value)}.", name
            )


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int beyond the digit limit
        text = "a number of thousands of digits"
    return text if len(text) <= 64 else text[:61] + "..."
