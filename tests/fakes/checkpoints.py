"""Tiny random-weight checkpoints in Hugging Face layout: config, safetensors, tokenizer, chat
template.

Knows file formats only; needs neither transformers nor the tokenizers package. The same arguments
give the same bytes. Weights are drawn so that greedy output wanders instead of repeating one token.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|unused|>")
EOS_TOKEN_ID = VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index("<|eos|>")
BOS_TOKEN_ID = EOS_TOKEN_ID - 1
IM_END_TOKEN_ID = EOS_TOKEN_ID + 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "initializer_range": 0.02,
}

# name -> what sets it apart
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama-mha": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 4,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 48,
    },
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TEXT = (
    "A quire is a gathering of pages, folded and stitched before the book is bound. The printer "
    "set the type by lamp "
    "light while the rain came down on the harbour, and the apprentice counted sheets: one, two, "
    "three, twenty four. "
    "When the last page was dry they carried the bundle to the window and read it aloud, slowly, "
    "so that every letter "
    "was heard. What is the answer to the question? The answer is written in the margin, and the "
    "margin is wide. "
    "Some words are long and others are short; some sentences end with a question, but most of "
    "them do not. "
    "The city had nine bridges, and under each of them a different boat waited for the morning. "
)


def make_checkpoint(
    directory: str | Path,
    arch: str = "llama",
    *,
    dtype: str = "float32",
    sharded: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `arch` (a key of ARCHITECTURES) and return its folder.

    `overrides` replace fields of config.json (None removes one); shapes follow. `sharded` splits
    the weights into two files with an index. Tokens: 256 bytes, merges, then SPECIAL_TOKENS.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_SHARED, **ARCHITECTURES[arch], "dtype": dtype, **overrides}
    config = {key: value for key, value in config.items() if value is not None}
    _write(folder / "config.json", config)
    tensors = random_weights(config, seed, _DTYPES[dtype])
    if sharded:
        names = sorted(tensors)
        files = {
            name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors"
            for i, name in enumerate(names)
        }
        for file in sorted(set(files.values())):
            save_file(
                {n: t for n, t in tensors.items() if files[n] == file},
                folder / file,
                {"format": "pt"},
            )
        total = sum(t.nbytes for t in tensors.values())
        _write(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": files},
        )
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    eos = [EOS_TOKEN_ID, IM_END_TOKEN_ID]
    _write(
        folder / "generation_config.json",
        {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": eos, "do_sample": False},
    )
    return folder


def random_weights(
    config: dict[str, Any], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor the architecture has, by its Hugging Face name; lm_head only when untied."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    kind = config["model_type"]
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    o_bias = kind != "qwen2" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    tensors: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, scale: float, centre: float = 0.0) -> None:
        tensors[name] = (torch.randn(*shape, generator=generator) * scale + centre).to(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool, gain: float = 1.0) -> None:
        draw(f"{name}.weight", rows, columns, scale=gain * columns**-0.5)
        if bias:
            draw(f"{name}.bias", rows, scale=0.3)

    # A tied head finds the token it has just read again, unless the layers speak louder than the
    # embedding.
    draw(
        "model.embed_tokens.weight",
        vocab,
        hidden,
        scale=0.2 if config.get("tie_word_embeddings") else 1.0,
    )
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        draw(f"{at}.input_layernorm.weight", hidden, scale=0.1, centre=1.0)
        linear(f"{at}.self_attn.q_proj", heads * head_dim, hidden, qkv_bias, gain=1.5)
        linear(f"{at}.self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias, gain=1.5)
        linear(f"{at}.self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias, gain=2.0)
        linear(f"{at}.self_attn.o_proj", hidden, heads * head_dim, o_bias, gain=2.0)
        if kind == "qwen3":
            draw(f"{at}.self_attn.q_norm.weight", head_dim, scale=0.1, centre=1.5)
            draw(f"{at}.self_attn.k_norm.weight", head_dim, scale=0.1, centre=1.5)
        draw(f"{at}.post_attention_layernorm.weight", hidden, scale=0.1, centre=1.0)
        linear(f"{at}.mlp.gate_proj", inner, hidden, mlp_bias, gain=1.5)
        linear(f"{at}.mlp.up_proj", inner, hidden, mlp_bias, gain=1.5)
        linear(f"{at}.mlp.down_proj", hidden, inner, mlp_bias, gain=2.0)
    draw("model.norm.weight", hidden, scale=0.1, centre=1.0)
    if not config.get("tie_word_embeddings"):
        linear("lm_head", vocab, hidden, False, gain=3.0)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json (byte-level BPE), tokenizer_config.json with the chat template,
    chat_template.jinja.
    """
    alphabet = _byte_alphabet()
    merges = _learn_merges(alphabet, VOCAB_SIZE - 256 - len(SPECIAL_TOKENS))
    words = [alphabet[byte] for byte in range(256)] + [a + b for a, b in merges]
    vocab = {word: i for i, word in enumerate(words)}
    added = [
        {
            "id": len(words) + i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    _write(folder / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(rest)
    }
    return [shown[byte] for byte in range(256)]


def _learn_merges(alphabet: list[str], count: int) -> list[tuple[str, str]]:
    """`count` BPE merges from the text above, ties by name, so that every machine learns the
    same.
    """
    space = alphabet[ord(" ")]
    words = [
        [*(alphabet[b] for b in (space_word).encode())]
        for space_word in _TEXT.split(" ")
        if space_word
    ]
    words = [[space, *word] for word in words] + words
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter((a, b) for word in words for a, b in zip(word, word[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
