"""Write a checkpoint of random weights in Hugging Face layout, to measure without a download.

The weights are noise scaled like a fresh initialisation; the tokenizer is the demo model's,
padded with filler words to the shape's vocabulary. Knows no engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "tiny": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768,
        "vocab_size": 4096, "max_position_embeddings": 8192,
    },
}  # fmt: skip
DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"


def weights(shape: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """All tensors of a tied Qwen3 of this shape, bf16."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std).to(torch.bfloat16)

    hidden, head, inner = shape["hidden_size"], shape["head_dim"], shape["intermediate_size"]
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    tensors = {
        "model.embed_tokens.weight": rand(shape["vocab_size"], hidden, std=0.02),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = rand(rows, columns, std=columns**-0.5)
        for name, size in (
            ("input_layernorm", hidden), ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", head), ("self_attn.k_norm", head),
        ):  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    return tensors


def tokenizer(vocab_size: int) -> str:
    """tokenizer.json text: the demo's, with filler entries no merge leads to."""
    spec = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    taken = set(vocab.values()) | {token["id"] for token in spec["added_tokens"]}
    for index in range(vocab_size):
        if index not in taken:
            vocab[f"\u0120w{index:06d}"] = index
    return json.dumps(spec)


def make(name: str, folder: Path, seed: int = 0) -> None:
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config.update(shape, rope_theta=1000000.0, tie_word_embeddings=True, layer_types=None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(tokenizer(shape["vocab_size"]), encoding="utf-8")
    for file in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file, folder / file)
    tensors = weights(shape, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {sum(t.numel() for t in tensors.values()) / 1e6:.1f}M parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.shape, args.folder, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
