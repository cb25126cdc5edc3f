"""The model families as data: each function turns a config.json into a DecoderConfig.

Knows what sets a family apart from plain Llama and which defaults its own config class has
(transformers, models/<family>/configuration_<family>.py); a checkpoint's config.json leaves out
fields that have their default.
"""

from __future__ import annotations

from quire.errors import ModelError
from quire_worker.models.config import DecoderConfig, decoder_config
from quire_worker.models.fields import Fields


def llama(fields: Fields) -> DecoderConfig:
    """Llama 2, 3, 3.x (arXiv 2302.13971, 2407.21783)."""
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    return decoder_config(fields, max_position=2048, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def mistral(fields: Fields) -> DecoderConfig:
    """Mistral 7B (arXiv 2310.06825): Llama with a sliding window in every layer; null turns it
    off.
    """
    window = 4096 if "sliding_window" not in fields.values else fields.values["sliding_window"]
    if window is not None:
        window = fields.integer("sliding_window", 4096)
    windows = (window or 0,) * fields.integer("num_hidden_layers")
    return decoder_config(fields, num_kv_heads=8, max_position=131072, layer_windows=windows)


def qwen2(fields: Fields) -> DecoderConfig:
    """Qwen2 and Qwen2.5 (arXiv 2407.10671): bias on q, k, v."""
    windows = _layer_windows(fields)
    return decoder_config(
        fields, num_kv_heads=32, max_position=32768, layer_windows=windows, qkv_bias=True
    )


def qwen3(fields: Fields) -> DecoderConfig:
    """Qwen3 dense (arXiv 2505.09388): RMSNorm on every query and key head, no bias."""
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        num_kv_heads=32,
        head_dim=128,
        max_position=32768,
        layer_windows=_layer_windows(fields),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
    )


def _layer_windows(fields: Fields) -> tuple[int, ...]:
    """Qwen's windows: in the layers from max_window_layers on, or where layer_types says so; off
    unless use_sliding_window.
    """
    num_layers = fields.integer("num_hidden_layers")
    if not fields.flag("use_sliding_window", False):
        return (0,) * num_layers
    window = fields.integer("sliding_window", 4096)
    types = fields.values.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else 0 for i in range(num_layers))
    sizes = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(t in sizes for t in types)
    ):
        raise ModelError(
            f"{fields.where}: layer_types must name {', '.join(sizes)} for each of {num_layers} "
            "layers"
        )
    return tuple(sizes[t] for t in types)
