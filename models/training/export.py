"""Writes a trained checkpoint as a Hugging Face model folder in bfloat16."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from corpus import END, STOP
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from train import MODELS, SIZES

# ChatML. A message's content is a string or a list of {"type": "text", "text": ...} parts.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def export(checkpoint, size, out):
    out.mkdir(parents=True, exist_ok=True)
    if out != MODELS / "demo":  # all sizes share the tokenizer
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(MODELS / "demo" / name, out / name)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    # The output projection is tied to the embedding, so it is not written.
    tensors = {
        "model." + name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in load_file(checkpoint).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    def write(name, value):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")

    write(
        "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "torch_dtype": "bfloat16",
            "vocab_size": tokenizer.get_vocab_size(),
            **SIZES[size],
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": stop,
            "pad_token_id": end,
        },
    )
    write(
        "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.4,
            "top_p": 0.95,
            "eos_token_id": [stop, end],
            "pad_token_id": end,
        },
    )
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="what train.py wrote")
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--out", type=Path, help="default: models/<size>")
    args = parser.parse_args()
    export(args.checkpoint, args.size, args.out or MODELS / args.size)
