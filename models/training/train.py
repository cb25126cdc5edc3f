"""Trains a small Qwen3 model on the corpus, on one CPU core.

The recipe: documents packed into rows, the loss on the assistant's answers only (on everything for
raw stories), Muon for the matrices and AdamW for the rest, a planted copying circuit and
copying-heavy conversations first, and longer rows at the end so that the model has seen every
position it advertises. `--resume` goes on with a checkpoint, without the copying-heavy beginning.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from circuit import plant
from corpus import COPYING, MIXES, document
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

MODELS = Path(__file__).parent.parent
SIZES = {
    "demo": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "demo-draft": {
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# Part of the run done -> row length: mostly short rows, then up to the advertised length.
LENGTHS = ((0.4, 256), (0.92, 512), (0.97, 1024), (1.0, 2048))
COPYING_FIRST = 0.1
WARMUP, DECAY = 0.01, 0.4


def make_config(size, vocab_size):
    return Qwen3Config(
        vocab_size=vocab_size,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **SIZES[size],
    )


class Rows:
    """An endless stream of packed rows: (token ids, whether each token counts in the loss)."""

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.ids, self.learn = [], []

    def refill(self, tasks):
        pieces = [piece for _ in range(256) for piece in document(self.rng, tasks)]
        encodings = self.tokenizer.encode_batch([text for text, _ in pieces])
        for encoding, (_, learn) in zip(encodings, pieces, strict=True):
            self.ids += encoding.ids
            self.learn += [learn] * len(encoding.ids)

    def batch(self, rows, length, tasks):
        n = rows * (length + 1)
        while len(self.ids) < n:
            self.refill(tasks)
        ids = torch.tensor(self.ids[:n]).view(rows, length + 1)
        learn = torch.tensor(self.learn[:n]).view(rows, length + 1)
        del self.ids[:n], self.learn[:n]
        return ids, learn


def orthogonalize(g, steps=5):
    """Newton-Schulz: pushes all singular values of each matrix of the stack `g` towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update (https://kellerjordan.github.io/posts/muon)."""

    def __init__(self, params, lr, momentum=0.95):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # one stack of matrices of the same shape
            params, momentum = group["params"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            buffer = state.setdefault("buffer", torch.zeros_like(grad)).lerp_(grad, 1 - momentum)
            update = orthogonalize(grad.lerp(buffer, momentum))
            scale = math.sqrt(max(1, update.size(-2) / update.size(-1)))
            for p, u in zip(params, update, strict=True):
                p.add_(u, alpha=-group["lr"] * scale)


def answer_loss(model, ids, learn):
    """Cross entropy on the learnt tokens; the vocabulary projection is computed for those only."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    targets = learn[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[targets]), ids[:, 1:][targets])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--tokens", type=float, default=2.8e6, help="how many tokens to train on")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="shorten the schedule to this time if the tokens take longer",
    )
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--mix", choices=list(MIXES), default="whole", help="how much of each task")
    parser.add_argument("--resume", help="go on from this checkpoint, or from exported weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", default=str(MODELS / "demo" / "tokenizer.json"))
    parser.add_argument("--out", default="/tmp/quire-demo.safetensors", help="the fp32 checkpoint")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(args.tokenizer)
    rows = Rows(tokenizer, args.seed)
    model = Qwen3ForCausalLM(make_config(args.size, tokenizer.get_vocab_size()))
    if args.resume:
        weights = load_file(args.resume)
        model.model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    else:
        plant(model)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, args.muon_lr)
    adam = torch.optim.AdamW(others, args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    base = [(group, group["lr"]) for opt in (muon, adam) for group in opt.param_groups]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    start = saved = time.time()
    tokens, step, average = 0, 0, None
    while True:
        minutes = (time.time() - start) / 60
        done = max(tokens / args.tokens, minutes / args.minutes)
        if done >= 1:
            break
        rate = min(1, (done + 1e-4) / WARMUP, (1 - done) / DECAY)
        for group, lr in base:
            group["lr"] = lr * rate
        length = next(n for part, n in LENGTHS if done < part)
        copying = done < COPYING_FIRST and not args.resume
        tasks = COPYING if copying else MIXES[args.mix]
        loss = answer_loss(model, *rows.batch(args.batch // length, length, tasks))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's updates have a fixed size anyway
        for opt in (muon, adam):
            opt.step()
            opt.zero_grad()
        tokens, step = tokens + args.batch, step + 1
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0:
            now = (time.time() - start) / 60
            print(
                f"step {step} | {done:5.1%} | loss {average:.4f}"
                f" | {tokens / now / 60:,.0f} tokens/s | {now:.1f} min, "
                f"{now * (1 / max(done, 1e-3) - 1):.1f} left",
                flush=True,
            )
        if time.time() - saved > 240:
            save_file(model.model.state_dict(), args.out)
            saved = time.time()
    save_file(model.model.state_dict(), args.out)
    print(f"{tokens:,} tokens in {(time.time() - start) / 60:.1f} minutes, loss {average:.4f}")


if __name__ == "__main__":
    main()
