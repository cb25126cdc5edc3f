"""Trains the byte-level BPE tokenizer on the corpus and saves it in the Hugging Face layout.

All 256 bytes are in the vocabulary, so any UTF-8 text survives encoding and decoding. Text is split
the way Qwen's tokenizer splits it, with every digit a token of its own, which makes sums learnable.
"""

import argparse
import json
import random
from pathlib import Path

from corpus import END, START, STOP, document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(vocab_size, documents, seed=0):
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, STOP],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (text for _ in range(documents) for text, _ in document(rng))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": STOP,
                "pad_token": END,
                "bos_token": None,
                "unk_token": None,
                "additional_special_tokens": [START, STOP],
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "demo"))
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=20000)
    args = parser.parse_args()
    result = train_tokenizer(args.vocab_size, args.documents)
    save(result, args.out)
    print(f"{result.get_vocab_size()} tokens in {args.out}/tokenizer.json")
