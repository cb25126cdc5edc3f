"""A checkpoint's `config.json` -> DecoderConfig: everything the decoder needs to know, checked.

Knows field names of Hugging Face configs, both the older layout (rope_theta, rope_scaling,
torch_dtype) and that of transformers 5 (rope_parameters, dtype). Knows no weights. `auto_map` and
other code in a checkpoint is never run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ModelError
from quire_worker.models.fields import Fields

_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Which rotary embedding: see `quire_worker.layers.rope` for what each kind computes."""

    theta: float
    rotary_dim: int  # elements of a head that turn; the rest passes through
    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: context before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: scale of cos and sin; 0 = from the factor
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One Llama-like decoder, described by data."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int, ...]  # [num_layers], keys a layer sees; 0 = all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    tie_word_embeddings: bool = False
    dtype: str = ""  # of the checkpoint, by its own word; "" = it does not say
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sliding_window(self) -> int:
        """The window when every layer has the same one, else 0."""
        windows = set(self.layer_windows)
        return windows.pop() if len(windows) == 1 else 0


def read_config(model_dir: str | Path) -> DecoderConfig:
    """Read `config.json` (and the eos ids of `generation_config.json`). ModelError names the field
    and the remedy.
    """
    folder = Path(model_dir)
    path = folder / "config.json"
    values = _read_json(path)
    if "quantization_config" in values:
        raise ModelError(
            f"{path}: the checkpoint is quantised ({_quant_name(values)}), which this version "
            "cannot run; use the "
            "unquantised checkpoint of the same model"
        )
    config = parse_config(values, str(path))
    extra = folder / "generation_config.json"
    if extra.is_file():
        more = Fields(_read_json(extra), str(extra)).token_ids("eos_token_id", config.vocab_size)
        merged = tuple(dict.fromkeys(config.eos_token_ids + more))
        config = dataclasses.replace(config, eos_token_ids=merged)
    return config


def parse_config(values: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """A config.json's object -> DecoderConfig, by the architecture's function from `registry`."""
    from quire_worker.models import registry

    names = values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{where}: architectures is {names!r}, expected a list with the model's class name"
        )
    describe = registry.describe_function(names, where)
    config = describe(Fields(values, where))
    _check(config, where)
    return config


def decoder_config(
    fields: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    max_position: int | None = None,
    **variant: Any,
) -> DecoderConfig:
    """What all Llama-like configs share; `variant` sets the rest. Defaults are those of the model's
    own config class.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers")
    vocab_size = fields.integer("vocab_size")
    if not fields.has("head_dim") and head_dim is None and hidden_size % num_heads:
        raise ModelError(
            f"{fields.where}: head_dim is missing and hidden_size {hidden_size} is not a multiple "
            "of "
            f"num_attention_heads {num_heads}"
        )
    head_dim = fields.integer("head_dim", head_dim or hidden_size // num_heads)
    max_position = fields.integer("max_position_embeddings", max_position)
    act = fields.text("hidden_act", "silu")
    if act != "silu":
        raise ModelError(f"{fields.where}: hidden_act is {act!r}; this version runs silu only")
    variant.setdefault("layer_windows", (0,) * num_layers)
    return DecoderConfig(
        architecture=fields.values["architectures"][0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_kv_heads or num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, head_dim, max_position),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(fields),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        **variant,
    )


def _rope(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """rope_parameters (transformers 5), or rope_theta + rope_scaling (before)."""
    if fields.has("rope_parameters"):
        rope = fields.section("rope_parameters")
    elif fields.has("rope_scaling"):
        rope = fields.section("rope_scaling")
    else:
        rope = Fields({}, fields.where)
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ModelError(f"{rope.where}: per-layer-type RoPE is not supported by this version")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ModelError(
            f"{rope.where}: rope_type is {kind!r}; this version knows {', '.join(_ROPE_KINDS)}"
        )
    theta_default = fields.number("rope_theta", 10000.0)
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelError(
            f"{rope.where}: RoPE turns {rotary_dim} of {head_dim} elements a head, expected an "
            "even part"
        )
    more: dict[str, Any] = {}
    if kind != "default":
        more["factor"] = rope.number("factor")
    if kind == "llama3":
        more |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if more["low_freq_factor"] >= more["high_freq_factor"]:
            raise ModelError(f"{rope.where}: low_freq_factor must be below high_freq_factor")
    if kind in ("llama3", "yarn"):
        original = fields.integer("original_max_position_embeddings", max_position)
        more["original_max_position"] = rope.integer("original_max_position_embeddings", original)
    if kind == "yarn":
        more |= {
            "beta_fast": rope.number("beta_fast", 32.0),
            "beta_slow": rope.number("beta_slow", 1.0),
        }
        more |= {
            key: rope.number(key)
            for key in ("attention_factor", "mscale", "mscale_all_dim")
            if rope.values.get(key)
        }
        more["truncate"] = rope.flag("truncate", True)
    return RopeConfig(
        theta=rope.number("rope_theta", theta_default), rotary_dim=rotary_dim, kind=kind, **more
    )


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype", fields.text("torch_dtype", "")).removeprefix("torch.")
    if name and name not in _DTYPES:
        raise ModelError(
            f"{fields.where}: dtype is {name!r}; this version runs {', '.join(_DTYPES)}"
        )
    return name


def _check(config: DecoderConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {config.num_heads} is not a multiple of "
            "num_key_value_heads "
            f"{config.num_kv_heads}"
        )


def _quant_name(values: dict[str, Any]) -> str:
    section = values["quantization_config"]
    return (
        str(section.get("quant_method", "unknown method"))
        if isinstance(section, dict)
        else "unknown method"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; --model must name a folder with a Hugging Face checkpoint "
            "(config.json and "
            "*.safetensors)"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}); the download may be incomplete"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values
