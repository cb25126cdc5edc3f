"""Measures an exported model with transformers: prompts per task, and how many answers are right.

The prompts come from the corpus grammar with a seed that training does not use. What counts as
right is checked by code: an exact answer where there is one, and for stories that the asked animal
is there, that one hero goes through the whole story and that no stranger turns up.
"""

import argparse
import random
import re
import time

import chat
import torch
import words as W
from stories import a, made_up, story
from train import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(model, tokenizer, prompts, max_tokens, sample):
    """Continues all prompts in one left-padded batch: [(text, ended by itself), ...]."""
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    settings = {} if sample else {"do_sample": False, "temperature": None, "top_p": None}
    output = model.generate(**batch, max_new_tokens=max_tokens, **settings)
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in model.generation_config.eos_token_id]
        answers.append((tokenizer.decode(row[: ends[0]] if ends else row), bool(ends)))
    return answers


def names_in(text):
    """Capitalised words that do not begin a sentence, in order of appearance."""
    found = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text)
    return list(dict.fromkeys(found))


def good_story(text, kind):
    """The animal is in the first sentence, its hero stays to the end, at most one more name.

    A story that falls apart shows in a doubled word, or in meeting the hero as if a stranger.
    """
    names = names_in(text)
    return (
        kind in text.split(".")[0]
        and 1 <= len(names) <= 2
        and names[0] in text[len(text) // 2 :]
        and names[0] + " the " not in text
        and not re.search(r"\b(\w+) \1\b", text)
    )


def tasks(rng, n):
    """name -> list of (conversation, function that says whether an answer is right)."""

    def exact(task):
        """The first exchange of a corpus task; right is the corpus's own answer."""
        talk = task(rng)
        return talk[:1], lambda text, want=talk[1]: text == want

    def narrow(task, keep):
        while True:
            talk = task(rng)
            if keep(talk):
                return talk[:1], lambda text, want=talk[1]: text == want

    def story_of():
        kind = rng.choice(W.ANIMALS)
        return [f"Tell me a story about {a(kind)}."], lambda text, kind=kind: good_story(text, kind)

    def story_then_name():
        text, v, _, _ = story(rng)
        kind = v["kind"]
        return (
            [f"Tell me a story about {a(kind)}.", text, f"What is the name of the {kind}?"],
            lambda answer, want=v["hero"]: want in answer,
        )

    def introduced():
        name = made_up(rng, True)
        return [f"My name is {name}."], lambda answer: f" {name}!" in answer

    def raw_story():
        return None, lambda text: good_story("Once upon a time" + text, "")

    def small(talk):
        return "so" not in talk[1]  # larger sums are answered by way of tens and ones

    makers = {
        "story about the asked animal": story_of,
        "raw story after 'Once upon a time'": raw_story,
        "question about a story in the prompt": lambda: exact(chat.question),
        "follow-up question, second turn": story_then_name,
        "counting": lambda: exact(chat.count),
        "sums up to 10 + 10": lambda: narrow(chat.add, small),
        "sums of two-digit numbers": lambda: narrow(chat.add, lambda talk: not small(talk)),
        "JSON from a sentence": lambda: exact(chat.to_json),
        "repeat after me": lambda: exact(chat.repeat),
        "what the user said two turns ago": lambda: remembered(rng),
        "greeting, in any casing": lambda: exact(chat.greeting),
        "greeting a made-up name": introduced,
        "who it is": lambda: exact(chat.who),
    }
    return {name: [make() for _ in range(n)] for name, make in makers.items()}


def remembered(rng):
    talk = chat.remember(rng)
    return talk[:-1], lambda text, want=talk[-1]: text == want


def render(tokenizer, talk):
    if talk is None:
        return "Once upon a time"
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(talk)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def agreement(model, draft, tokenizer, prompts):
    """How many of the tokens that `model` picks greedily `draft` would have proposed."""
    same = total = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        start = ids["input_ids"].shape[1]
        output = model.generate(
            **ids, max_new_tokens=300, do_sample=False, temperature=None, top_p=None
        )
        proposed = draft(output).logits[0, start - 1 : -1].argmax(-1)
        same += (proposed == output[0, start:]).sum().item()
        total += len(proposed)
    return same / total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODELS / "demo"))
    parser.add_argument("-n", type=int, default=30, help="prompts per task")
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--greedy", action="store_true", help="instead of the model's own settings")
    parser.add_argument("--draft", help="a draft model: only measure how often it agrees")
    parser.add_argument("--show", type=int, default=0, help="print this many answers of each task")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    cases = tasks(random.Random(args.seed), args.n)
    if args.draft:
        draft = AutoModelForCausalLM.from_pretrained(args.draft, dtype=torch.float32).eval()
        for name, rows in cases.items():
            prompts = [render(tokenizer, talk) for talk, _ in rows]
            print(f"{name}: {agreement(model, draft, tokenizer, prompts):.0%} agreed")
        return
    print("| task | right | ended by itself |\n|---|---|---|")
    start, samples = time.time(), []
    for name, rows in cases.items():
        prompts = [render(tokenizer, talk) for talk, _ in rows]
        answers = generate(model, tokenizer, prompts, 400, not args.greedy)
        right = sum(check(text) for (text, _), (_, check) in zip(answers, rows, strict=True))
        print(f"| {name} | {right}/{args.n} | {sum(e for _, e in answers)}/{args.n} |", flush=True)
        samples += [
            (check(text), prompt, text)
            for prompt, (text, _), (_, check) in zip(prompts, answers, rows, strict=True)
        ][: args.show]
    for ok, prompt, text in samples:
        print(f"\n--- {'right' if ok else 'WRONG'}\n{prompt}{text}")
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
