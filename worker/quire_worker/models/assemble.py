"""Checkpoint tensors -> Decoder: names, shapes, fusing of QKV and gate-up, dtype, prepacking.

Knows the tensor names Hugging Face gives Llama-like models; no file format, no arithmetic of a
step. Tensors go through one layer at a time, so the peak above the finished model is one layer's
copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.errors import ModelError
from quire_worker.layers.linear import Linear, make_linear
from quire_worker.layers.ops import ops_for
from quire_worker.layers.rope import build_cos_sin
from quire_worker.models.checkpoint import Checkpoint
from quire_worker.models.config import DecoderConfig
from quire_worker.models.decoder import Decoder, Layer

Progress = Callable[[int, int], None]  # bytes of weights taken, bytes in all

_PACK_TIED_BELOW = (
    64 << 20
)  # bytes up to which a tied lm_head gets a packed copy beside the embedding table


class Taker:
    """Takes tensors out of a checkpoint by name, counts them, and knows which were not asked
    for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.progress = progress or (lambda done, total: None)
        self.taken: set[str] = set()
        self.done_bytes = 0
        self.num_parameters = 0

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor on the device, in the model's dtype; still the file's mapped memory where
        nothing changes.
        """
        found = self.checkpoint.tensor(name, shape)
        self.taken.add(name)
        self.num_parameters += found.numel()
        self.done_bytes += found.nbytes
        self.progress(self.done_bytes, max(self.checkpoint.total_bytes, 1))
        return found.to(device=self.device, dtype=self.dtype)

    def optional(self, wanted: bool, name: str, *shape: int) -> torch.Tensor | None:
        return self(name, *shape).clone() if wanted else None

    def check_all_taken(self) -> None:
        """A tensor without a place (a bias the config denies, a layer too many) would silently
        change the answer.
        """
        ignored = ("rotary_emb.inv_freq", "lm_head.weight")
        rest = sorted(
            n for n in self.checkpoint.entries if n not in self.taken and not n.endswith(ignored)
        )
        if rest:
            raise ModelError(
                f"{self.checkpoint.folder}: {len(rest)} tensors have no place in the model that "
                "config.json describes, "
                f"the first is {rest[0]}; config.json may belong to another model"
            )


def assemble(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Decoder:
    """ModelError when a tensor is missing, of another shape, or left over."""
    take = Taker(checkpoint, device, dtype, progress)
    hidden = config.hidden_size
    embedding = take("model.embed_tokens.weight", config.vocab_size, hidden)
    if device.type == "cpu":
        # Copied, like the norms: one view of the mapped file would keep all its pages, and the
        # linears have copies of their own.
        embedding = embedding.clone()
    layers = [_layer(config, take, i) for i in range(config.num_layers)]
    final_norm = take("model.norm.weight", hidden).clone()
    if config.tie_word_embeddings:
        # In f32 torch's plain product gives other bits with other thread counts: always pack.
        prepack = dtype == torch.float32 or embedding.nbytes <= _PACK_TIED_BELOW
        lm_head = make_linear(embedding, prepack=prepack)
    else:
        lm_head = make_linear(take("lm_head.weight", config.vocab_size, hidden))
    take.check_all_taken()
    take.progress(checkpoint.total_bytes, max(checkpoint.total_bytes, 1))
    return Decoder(
        config=config,
        dtype=dtype,
        device=device,
        ops=ops_for(device),
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        lm_head=lm_head,
        cos_sin=build_cos_sin(config.rope, config.max_position_embeddings, device),
        num_parameters=take.num_parameters,
        weight_bytes=take.num_parameters * dtype.itemsize,
        numerics=f"{device.type}-{str(dtype).removeprefix('torch.')}",
    )


def _layer(config: DecoderConfig, take: Taker, number: int) -> Layer:
    at = f"model.layers.{number}"
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_heads * head_dim, config.num_kv_heads * head_dim
    qkv = [
        (f"{at}.self_attn.{name}_proj", rows)
        for name, rows in (("q", q_out), ("k", kv_out), ("v", kv_out))
    ]
    gate_up = [(f"{at}.mlp.{name}_proj", inner) for name in ("gate", "up")]
    return Layer(
        input_norm=take(f"{at}.input_layernorm.weight", hidden).clone(),
        qkv=_fused(take, qkv, hidden, config.qkv_bias),
        q_norm=take.optional(config.qk_norm, f"{at}.self_attn.q_norm.weight", head_dim),
        k_norm=take.optional(config.qk_norm, f"{at}.self_attn.k_norm.weight", head_dim),
        o=_fused(take, [(f"{at}.self_attn.o_proj", hidden)], q_out, config.o_bias),
        post_norm=take(f"{at}.post_attention_layernorm.weight", hidden).clone(),
        gate_up=_fused(take, gate_up, hidden, config.mlp_bias),
        down=_fused(take, [(f"{at}.mlp.down_proj", hidden)], inner, config.mlp_bias),
        window=config.layer_windows[number],
    )


def _fused(take: Taker, parts: list[tuple[str, int]], in_features: int, bias: bool) -> Linear:
    """One linear whose outputs are those of `parts` ((name, out_features)) one after another."""
    weights = [take(f"{name}.weight", rows, in_features) for name, rows in parts]
    biases = [take(f"{name}.bias", rows) for name, rows in parts] if bias else []
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return make_linear(weight, torch.cat(biases) if biases else None)
