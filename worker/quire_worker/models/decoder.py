"""One configurable decoder over paged KV memory: embeddings, layers, final norm, logits.

Knows DecoderConfig and tensors; no requests, no sampling, no files. Llama, Mistral, Qwen2 and Qwen3
are this decoder with other data. Rows (tokens) are independent of each other except through the KV
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from quire_worker.kv_cache import KVCache
from quire_worker.layers.linear import Linear
from quire_worker.layers.metadata import AttentionMetadata
from quire_worker.layers.ops import Ops
from quire_worker.models.config import DecoderConfig


@dataclass(slots=True)
class Layer:
    """One layer's weights. Norm weights are [hidden_size], head norms [head_dim], in the model's
    dtype.
    """

    input_norm: torch.Tensor
    qkv: Linear  # hidden -> (H + 2 G) * D: queries, keys, values
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear  # H * D -> hidden
    post_norm: torch.Tensor
    gate_up: Linear  # hidden -> 2 * intermediate, gate first
    down: Linear  # intermediate -> hidden
    window: int  # keys this layer sees; 0 = all


@dataclass(slots=True)
class Decoder:
    """Made by `quire_worker.loader.load_model`; immutable afterwards."""

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    embedding: torch.Tensor  # [vocab_size, hidden_size]
    layers: list[Layer]
    final_norm: torch.Tensor  # [hidden_size]
    lm_head: Linear
    cos_sin: torch.Tensor  # f32 [max_position, rotary_dim]
    num_parameters: int
    weight_bytes: int
    numerics: str = ""  # outcome of the row-invariance proof, for system_fingerprint
    tiling: Any = None  # CPU: quire_kernels.cpu.plan.Tiling, part of that outcome

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attn: AttentionMetadata,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """One step. input_ids, positions int [num_tokens] -> [num_tokens, hidden_size], normed, in
        the model's dtype.

        Writes K and V of every token at attn.slot_mapping before attention reads them.
        """
        config, ops = self.config, self.ops
        if self.device.type == "cpu" and attn.step_plan is None:
            attn.step_plan = self._new_step_plan()
        num_tokens, num_heads, num_kv_heads = (
            input_ids.shape[0],
            config.num_heads,
            config.num_kv_heads,
        )
        sections = (num_heads, num_kv_heads, num_kv_heads)
        write_extras, attention_extras = ops.write_extras(attn), ops.attention_extras(attn)
        scale = config.head_dim**-0.5

        residual = F.embedding(input_ids, self.embedding)
        x = ops.rms_norm(residual, self.layers[0].input_norm, config.norm_eps)
        context = x.new_empty(num_tokens, num_heads, config.head_dim)
        for i, layer in enumerate(self.layers):
            k_cache, v_cache = kv_cache.layer(i)
            heads = layer.qkv(x).view(num_tokens, sum(sections), config.head_dim)
            q, k, v = heads.split(sections, dim=1)
            ops.rope_kv_write(
                q,
                k,
                v,
                positions,
                self.cos_sin,
                k_cache,
                v_cache,
                attn.slot_mapping,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=config.norm_eps,
                **write_extras,
            )
            ops.paged_attention(
                context,
                q,
                k_cache,
                v_cache,
                attn.block_table,
                attn.slots,
                attn.query_start_loc,
                attn.seq_lens,
                scale=scale,
                sliding_window=layer.window,
                block_size=kv_cache.block_size,
                **attention_extras,
            )
            x = layer.o(context.view(num_tokens, -1))
            x, residual = ops.add_rms_norm(x, residual, layer.post_norm, config.norm_eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
            after = self.layers[i + 1].input_norm if i + 1 < len(self.layers) else self.final_norm
            x, residual = ops.add_rms_norm(x, residual, after, config.norm_eps)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden_size], rows of what `forward` returned -> f32 [n, vocab_size]."""
        return self.lm_head(hidden).float()

    def _new_step_plan(self) -> Any:
        from quire_kernels.cpu.plan import StepPlan

        return StepPlan() if self.tiling is None else StepPlan(tiling=self.tiling)
