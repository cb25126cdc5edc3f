"""Rotary position embeddings: inverse frequencies of each variant and the table of angles.

Knows RopeConfig, no checkpoints. Formulas follow transformers, modeling_rope_utils.py, in f32 and
in its order of operations, so that tables agree with those a checkpoint was trained on. Variants
whose angles depend on the length of the sequence (dynamic NTK, longrope) are absent: a key written
to the cache could not keep them.
"""

from __future__ import annotations

import math

import torch

from quire_kernels.kv_write import build_cos_sin_cache
from quire_worker.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """f32 [rotary_dim / 2], radians per position."""
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    powers = rope.theta**exponent
    plain = 1.0 / powers
    if rope.kind == "linear":  # position interpolation, arXiv 2306.15595
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(powers, rope)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 except for yarn."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def build_cos_sin(rope: RopeConfig, max_position: int, device: torch.device) -> torch.Tensor:
    """f32 [max_position, rotary_dim]: the cosines of each position's angles, then their sines."""
    table = build_cos_sin_cache(inverse_frequencies(rope), max_position)
    return table.mul_(attention_factor(rope)).to(device)


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    context = rope.original_max_position
    wavelength = 2 * math.pi / plain
    long, short = context / rope.low_freq_factor, context / rope.high_freq_factor
    scaled = torch.where(wavelength > long, plain / rope.factor, plain)
    blend = (context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = ~(wavelength < short) & ~(wavelength > long)
    return torch.where(between, blended, scaled)


def _yarn(powers: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): fast dimensions extrapolate, slow ones interpolate, with a ramp
    between.
    """
    dim, context = rope.rotary_dim, rope.original_max_position

    def dimension_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
