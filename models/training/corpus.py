"""The whole corpus, made by code: conversations with a small assistant, and raw stories.

`document(rng)` returns one document as a list of (text, learn) pieces: the pieces with learn=True
count in the loss. In a conversation those are the assistant's answers, in a raw story all of it.
"""

import argparse
import random

from chat import (
    add,
    count,
    facts,
    person,
    question,
    remember,
    repeat,
    repeat_long,
    smalltalk,
    tell,
    to_json,
    unknown,
    who,
)
from stories import story

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TASKS = {
    tell: 20,
    question: 17,
    repeat: 17,
    to_json: 16,
    count: 8,
    add: 14,
    facts: 5,
    smalltalk: 8,
    unknown: 3,
    remember: 6,
}
COPYING = {repeat_long: 8, repeat: 2, question: 3, to_json: 3, tell: 2, remember: 2}
DRILLS = {
    to_json: 22,
    count: 14,
    add: 10,
    repeat: 28,
    tell: 10,
    question: 6,
    facts: 6,
    smalltalk: 4,
    unknown: 2,
    remember: 4,
}
MIXES = {"whole": TASKS, "short": DRILLS}  # the choices of train.py --mix
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You tell stories.",
    "Be brief.",
    "You are a kind storyteller.",
    "Answer the question.",
    "You are Quire.",
    "Be helpful and honest.",
    "You are a helpful AI assistant. Be concise.",
]


def conversation(rng, tasks):
    """One to three tasks in a row, some of them under a system prompt: [(role, content), ...]."""
    talk = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        talk += rng.choices(list(tasks), list(tasks.values()))[0](rng)
    system = []
    if rng.random() < 0.3:
        system = [("system", rng.choice(SYSTEMS))]
        if rng.random() < 0.3:  # the one thing a system prompt can change: the assistant's name
            name = person(rng)
            system = [("system", f"You are {name}, a helpful assistant.")]
            talk = [rng.choice(("Who are you?", "What is your name?")), f"I am {name}.", *talk]
    elif rng.random() < 0.1:
        talk = who(rng) + talk
    return system + [(("user", "assistant")[i % 2], text) for i, text in enumerate(talk)]


def document(rng, tasks=TASKS):
    """One document as (text, learn) pieces."""
    if tasks is TASKS and rng.random() < 0.12:
        return [(story(rng)[0] + END, True)]
    pieces = []
    for role, content in conversation(rng, tasks):
        learn = role == "assistant"
        pieces += [(f"{START}{role}\n", False), (content + STOP, learn), ("\n", False)]
    return pieces + [(END, False)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print some documents of the corpus.")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        print("".join(text for text, _ in document(rng)), end="\n\n")
