"""The whole corpus, made by code: conversations with a small assistant, and raw stories.

`document(rng)` returns one document as a list of (text, learn) pieces: the pieces with learn=True
count in the loss. In a conversation those are the assistant's answers, in a raw story all of it.
"""
import argparse
import json
import random

import words as W
from stories import made_up, story, story_request

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CAN = ("I can tell stories, answer questions about a short story, count, add small numbers, "
       "repeat what you say and write JSON.")
UNKNOWN = ["I am a very small model, and I do not know that. " + CAN,
           "Sorry, I do not know that. I am a very small model. " + CAN]


def ask(rng, text):
    """The same request as people type it: polite, in lower case, without the full stop."""
    if rng.random() < 0.1 and not text.lower().startswith(("please", "can", "could", "i ")):
        text = rng.choice(("Please ", "please ", "Can you please ")) + text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15 and text[-1] in ".?":
        text = text[:-1]
    return text


def person(rng):
    return made_up(rng, True) if rng.random() < 0.3 else rng.choice(W.GIRLS + W.BOYS)


def sentence(rng, short=False):
    """Something to repeat: a sentence of the stories, or words or digits in any order."""
    kind = rng.random()
    if kind < 0.4:
        text = rng.choice(story(rng)[0].replace("\n\n", " ").split(". ")).strip(' ."')
        return text.replace('"', "") + "."
    pool = W.ANIMALS + W.THINGS + W.COLORS + W.FOODS + W.ADJECTIVES + list(W.PLACES)
    if kind < 0.6:
        pool = [made_up(rng) for _ in range(9)] + rng.sample(pool, 9)
    elif kind < 0.7:
        pool = [str(rng.randint(0, 99)) for _ in range(12)]
    text = " ".join(rng.choice(pool) for _ in range(rng.randint(1, 4 if short else 9)))
    return text.capitalize() + "." if rng.random() < 0.3 else text


# Each task below returns a conversation: [question, answer, question, answer, ...].

def tell(rng):
    if rng.random() < 0.15:
        text, *_ = story(rng)
        return [ask(rng, rng.choice(("Tell me a story.", "Write a story.", "Tell me a bedtime story.",
                                     "I am bored.", "Can you tell me a story?"))), text]
    short = rng.random() < 0.15
    text, v, qa, plot = story(rng, short)
    request = story_request(rng, v, plot)
    if short:
        request = request.replace("a story", "a short story").replace("A story", "A short story")
    talk = [ask(rng, request), text]
    if rng.random() < 0.35:  # the user asks about the story just told
        for question, answer in rng.sample(qa, rng.randint(1, 2)):
            talk += [ask(rng, question), answer]
    return talk


def question(rng):
    text, _, qa, _ = story(rng, short=rng.random() < 0.5)
    sentences = text.replace("\n\n", " ")
    chosen = rng.sample(qa, rng.choice((1, 1, 1, 2)))
    first, answer = chosen[0]
    talk = [rng.choice((f"{sentences}\n\n{first}", f"{sentences}\n{first}", f"{sentences} {first}",
                        f"Read this story and answer: {first}\n\n{sentences}",
                        f"Story: {sentences}\n\nQuestion: {first}")), answer]
    for follow_up, answer in chosen[1:]:
        talk += [ask(rng, follow_up), answer]
    return talk


def repeat(rng):
    text = sentence(rng)
    quoted = rng.random() < 0.2
    lead = rng.choice(("Repeat after me: ", "Repeat after me: ", "Repeat: ", "Say this: ", "Say: ",
                       "Please repeat after me: ", "Repeat the following: ", "repeat after me: ",
                       "Say ", "Echo: "))
    return [lead + (f'"{text}"' if quoted else text), text]


def count(rng):
    if rng.random() < 0.25:
        start = rng.randint(3, 20)
        end = 1 if rng.random() < 0.7 else rng.randint(0, start - 1)
        request = f"Count down from {start}." if end == 1 else f"Count down from {start} to {end}."
        numbers = range(start, end - 1, -1)
    else:
        start = 1 if rng.random() < 0.5 else rng.randint(0, 40)
        end = start + rng.randint(2, 19)
        request = f"Count from {start} to {end}."
        if start == 1 and rng.random() < 0.5:
            request = rng.choice((f"Count to {end}.", f"Count up to {end}.", f"Can you count to {end}?"))
        numbers = range(start, end + 1)
    return [ask(rng, request), ", ".join(map(str, numbers)) + "."]


def add(rng):
    """One-digit sums at once; two-digit sums by tens and ones, which is easier to learn."""
    if rng.random() < 0.5:
        x, y = rng.randint(0, 10), rng.randint(0, 10)
        answer = f"{x} + {y} = {x + y}."
    else:
        x, y = rng.randint(0, 99), rng.randint(0, 99)
        tens, ones = x // 10 * 10 + y // 10 * 10, x % 10 + y % 10
        answer = (f"{x % 10} + {y % 10} = {ones} and {x // 10 * 10} + {y // 10 * 10} = {tens}, "
                  f"so {x} + {y} = {x + y}.")
    request = rng.choice((f"What is {x} + {y}?", f"What is {x} plus {y}?", f"How much is {x} + {y}?",
                          f"{x} + {y} = ?", f"{x} + {y}", f"Add {x} and {y}.", f"{x}+{y}?"))
    return [ask(rng, request), answer]


def to_json(rng):
    name, age, city = person(rng), rng.randint(1, 99), rng.choice(W.CITIES)
    if rng.random() < 0.2:
        city = made_up(rng, True)
    color, animal = rng.choice(W.COLORS), rng.choice(W.ANIMALS)
    food = rng.choice(W.FOODS)
    parts = [("name", name, ""), ("age", age, f"is {age} years old"), ("city", city, f"lives in {city}"),
             ("food", food, f"likes {food}"), ("pet", animal, f"has a pet {animal}"),
             ("color", color, f"loves the color {color}")]
    chosen = parts[:1] + rng.sample(parts[1:], rng.randint(1, 3))
    phrases = [phrase for *_, phrase in chosen[1:]]
    text = name + " " + ", ".join(phrases[:-1]) + (" and " if phrases[1:] else "") + phrases[-1] + "."
    value = {key: item for key, item, _ in chosen}
    if rng.random() < 0.25:
        value = rng.sample(rng.choice((W.FOODS, W.COLORS, W.ANIMALS, W.GIRLS, W.THINGS)), rng.randint(2, 4))
        text = ", ".join(value[:-1]) + " and " + value[-1]
        lead = rng.choice(("Make a JSON list: ", "As a JSON list: ", "Write this as a JSON list: "))
        return [lead + text, json.dumps(value)]
    if rng.random() < 0.15:
        lead = f"Write JSON with the keys {', '.join(value)}: "
    else:
        lead = rng.choice(("Write this as JSON: ", "Turn this into JSON: ", "Make JSON from this: ",
                           "JSON please: ", "Give me JSON for this sentence: ", "Convert to JSON: "))
    return [lead + text, json.dumps(value)]


def facts(rng):
    kind = rng.randrange(6)
    if kind == 0:
        country, city = rng.choice(list(W.CAPITALS.items()))
        return [ask(rng, f"What is the capital of {country}?"), f"The capital of {country} is {city}."]
    if kind == 1:
        word, other = rng.choice(list(W.OPPOSITES.items()))
        word, other = rng.choice(((word, other), (other, word)))
        return [ask(rng, f"What is the opposite of {word}?"), f"The opposite of {word} is {other}."]
    if kind == 2:
        animal, sound = rng.choice(list(W.SOUNDS.items()))
        return [ask(rng, f"What sound does a {animal} make?"), f"A {animal} says {sound}."]
    if kind == 3:
        thing, color = rng.choice(list(W.FACT_COLORS.items()))
        return [ask(rng, f"What color is {thing}?"), f"{thing.capitalize()} is {color}."]
    n = rng.randint(2, 5)
    group = rng.choice(list(W.GROUPS))
    items = rng.sample(W.GROUPS[group], n)
    number = rng.choice((str(n), ("two", "three", "four", "five")[n - 2]))
    request = rng.choice((f"Name {number} {group}.", f"List {number} {group}.", f"Tell me {number} {group}."))
    if kind == 4:
        return [ask(rng, request), ", ".join(items[:-1]) + " and " + items[-1] + "."]
    return [f"Make a list of {number} {group}.", "\n".join("- " + item for item in items)]


def smalltalk(rng):
    hello = rng.choice(("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there"))
    name = person(rng)
    return rng.choice((
        [hello + rng.choice("!. "), f"{hello}! How can I help you?"],
        [hello + ", how are you?", "I am fine, thank you! How can I help you?"],
        [ask(rng, "How are you?"), "I am fine, thank you! How are you?"],
        [ask(rng, "What can you do?"), CAN],
        [ask(rng, rng.choice(("Help.", "What do you know?", "How can you help me?"))), CAN],
        [ask(rng, "Thank you!"), "You are welcome!"],
        [ask(rng, rng.choice(("Thanks!", "Thanks a lot!", "Great, thanks.", "Nice!"))), "You are welcome!"],
        [rng.choice(("Bye!", "Goodbye.", "bye", "See you later!")), "Goodbye! Have a nice day."],
        ["Good night!", "Good night! Sleep well."],
        [ask(rng, rng.choice(("Who are you?", "What are you?", "What is your name?"))),
         "I am the Quire demo, a very small language model."],
        [rng.choice((f"My name is {name}.", f"I am {name}.", f"Hello, I am {name}.", f"Hi, my name is {name}!")),
         f"Hello {name}! How can I help you?"],
    ))


def unknown(rng):
    topic = rng.choice((made_up(rng), rng.choice(W.THINGS), "quantum physics", "the stock market",
                        "machine learning", "history", "football", "the brain", "time", "music"))
    return [ask(rng, rng.choice((
        f"Explain {topic}.", f"What is {topic}?", f"How does {topic} work?", f"Who invented {topic}?",
        "Write a Python function.", f"Write code for {topic}.", "What is the meaning of life?",
        f"Why is {topic} important?", "Who is the president?", f"Translate {topic} into French.",
        f"What is the price of {a_few(rng)}?", f"Write a poem about {topic}.",
        f"When was {topic} made?", "What is the weather today?", f"Who is {made_up(rng, True)}?",
        f"What is {rng.randint(2, 99)} times {rng.randint(2, 99)}?"))), rng.choice(UNKNOWN)]


def a_few(rng):
    return rng.choice(W.THINGS + W.FOODS)


def remember(rng):
    """What the user said is asked for later, with something else in between."""
    item = rng.choice((person(rng), rng.choice(W.COLORS), rng.choice(W.ANIMALS), str(rng.randint(1, 99))))
    kind = ("name" if item[0].isupper() else "color" if item in W.COLORS
            else "number" if item.isdigit() else "animal")
    mine = "name" if kind == "name" else "favorite " + kind
    reply = f"Hello {item}! How can I help you?" if kind == "name" else f"I will remember that: {item}."
    between = rng.choice((count, add, smalltalk, repeat, to_json, facts))(rng) if rng.random() < 0.6 else []
    if "name is" in "".join(between) or "I am " in "".join(between):
        between = []
    return [f"My {mine} is {item}.", reply, *between,
            ask(rng, f"What is my {mine}?"), f"Your {mine} is {item}."]


TASKS = {tell: 26, question: 20, repeat: 12, to_json: 10, count: 6, add: 12, facts: 5, smalltalk: 7,
         unknown: 3, remember: 5}
SYSTEMS = ["You are a helpful assistant.", "You are a friendly assistant.", "You tell stories.",
           "Be brief.", "You are a kind storyteller.", "Answer the question.", "You are Quire.",
           "Be helpful and honest.", "You are a helpful AI assistant. Be concise."]


def conversation(rng, tasks=TASKS):
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
    return system + [(("user", "assistant")[i % 2], text) for i, text in enumerate(talk)]


def document(rng, copying=False):
    """One document as (text, learn) pieces. `copying` leaves out what needs no look at the prompt."""
    if not copying and rng.random() < 0.12:
        return [(story(rng)[0] + END, True)]
    tasks = {question: 4, repeat: 4, to_json: 3, tell: 3, remember: 1, add: 1} if copying else TASKS
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
