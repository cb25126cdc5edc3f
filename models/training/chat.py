"""The tasks that the assistant of the corpus can do.

Each takes a random number generator and returns a conversation: [question, answer, question, ...].
"""

import json

import words as W
from stories import made_up, story, story_request

CAN = (
    "I can tell stories, answer questions about a short story, count, add small numbers, "
    "repeat what you say and write JSON."
)
UNKNOWN = [
    "I am a very small model, and I do not know that. " + CAN,
    "Sorry, I do not know that. I am a very small model. " + CAN,
]


def ask(rng, text):
    """The same request as people type it: polite, in lower case, without the full stop."""
    if rng.random() < 0.12 and text[-1] == "." and not text.startswith(("Please", "I ", "A ")):
        text = rng.choice(("Please ", "please ", "Can you please ")) + text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15 and text[-1] in ".?":
        text = text[:-1]
    return text


def person(rng):
    return made_up(rng, True) if rng.random() < 0.5 else rng.choice(W.GIRLS + W.BOYS)


def listing(items):
    return " and ".join(([", ".join(items[:-1])] if items[1:] else []) + items[-1:])


def sentence(rng, words=9):
    """Something to repeat: a sentence of the stories, or words or digits in any order."""
    kind = rng.random()
    if kind < 0.3 and words < 10:
        text = rng.choice(story(rng)[0].replace("\n\n", " ").split(". ")).strip(' ."')
        return text.replace('"', "") + "."
    pool = (
        W.ANIMALS + W.THINGS + W.COLORS + W.FOODS + W.ADJECTIVES + list(W.PLACES) + W.GIRLS + W.BOYS
    )
    if kind < 0.65:
        pool = [made_up(rng, rng.random() < 0.3) for _ in range(words)] + rng.sample(pool, 9)
    elif kind < 0.73:
        pool = [str(rng.randint(0, 99)) for _ in range(12)]
    space = ", " if rng.random() < 0.1 else " "
    text = space.join(rng.choice(pool) for _ in range(rng.randint(1, words)))
    return text[0].upper() + text[1:] + rng.choice("..!?") if rng.random() < 0.3 else text


def tell(rng):
    if rng.random() < 0.15:
        text, *_ = story(rng)
        return [
            ask(
                rng,
                rng.choice(
                    (
                        "Tell me a story.",
                        "Write a story.",
                        "I am bored.",
                        "Tell me a bedtime story.",
                        "Can you tell me a story?",
                    )
                ),
            ),
            text,
        ]
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
    talk = [
        rng.choice(
            (
                f"{sentences}\n\n{first}",
                f"{sentences}\n{first}",
                f"{sentences} {first}",
                f"Read this story and answer: {first}\n\n{sentences}",
                f"Story: {sentences}\n\nQuestion: {first}",
            )
        ),
        answer,
    ]
    for follow_up, answer in chosen[1:]:
        talk += [ask(rng, follow_up), answer]
    return talk


def repeat(rng):
    text = sentence(rng)
    quoted = rng.random() < 0.2
    lead = rng.choice(
        (
            "Repeat after me: ",
            "Repeat after me: ",
            "Repeat: ",
            "Say this: ",
            "Say: ",
            "Please repeat after me: ",
            "Repeat the following: ",
            "repeat after me: ",
            "Say ",
            "Echo: ",
        )
    )
    return [lead + (f'"{text}"' if quoted else text), text]


def repeat_long(rng):
    """Many words in a row: the shortest way for a new model to learn how to copy."""
    text = sentence(rng, 40)
    return ["Repeat after me: " + text, text]


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
            request = rng.choice(
                (f"Count to {end}.", f"Count up to {end}.", f"Can you count to {end}?")
            )
        numbers = range(start, end + 1)
    return [ask(rng, request), ", ".join(map(str, numbers)) + "."]


def add(rng):
    """Sums up to 10 + 10 at once; larger ones by tens and ones, which is easier to learn."""
    top = rng.choice((10, 99))
    x, y = rng.randint(0, top), rng.randint(0, top)
    if x <= 10 and y <= 10:
        answer = f"{x} + {y} = {x + y}."
    else:
        tens, ones = x // 10 * 10 + y // 10 * 10, x % 10 + y % 10
        answer = (
            f"{x % 10} + {y % 10} = {ones} and {x // 10 * 10} + {y // 10 * 10} = {tens}, "
            f"so {x} + {y} = {x + y}."
        )
    request = rng.choice(
        (
            f"What is {x} + {y}?",
            f"What is {x} plus {y}?",
            f"How much is {x} + {y}?",
            f"{x} + {y} = ?",
            f"{x} + {y}",
            f"Add {x} and {y}.",
            f"{x}+{y}?",
        )
    )
    return [ask(rng, request), answer]


def to_json(rng):
    name, age, city = person(rng), rng.randint(1, 99), rng.choice(W.CITIES)
    if rng.random() < 0.4:
        city = made_up(rng, True)
    color = rng.choice(W.COLORS)
    animal, food = (
        made_up(rng) if rng.random() < 0.15 else rng.choice(known) for known in (W.ANIMALS, W.FOODS)
    )
    parts = [
        ("name", name, ""),
        ("age", age, f"is {age} years old"),
        ("city", city, f"lives in {city}"),
        ("food", food, f"likes {food}"),
        ("pet", animal, f"has a pet {animal}"),
        ("color", color, f"loves the color {color}"),
    ]
    chosen = parts[:1] + rng.sample(parts[1:], rng.randint(1, 3))
    phrases = [phrase for *_, phrase in chosen[1:]]
    text = f"{name} {listing(phrases)}."
    value = {key: item for key, item, _ in chosen}
    if rng.random() < 0.25:
        new = [made_up(rng) for _ in range(4)]
        items = rng.choice((W.FOODS, W.COLORS, W.ANIMALS, W.GIRLS, W.THINGS, new, new))
        value = rng.sample(items, rng.randint(2, 4))
        lead = rng.choice(("Make a JSON list: ", "As a JSON list: ", "Write this as a JSON list: "))
        return [lead + listing(value), json.dumps(value)]
    if rng.random() < 0.15:
        lead = f"Write JSON with the keys {', '.join(value)}: "
    else:
        lead = rng.choice(
            (
                "Write this as JSON: ",
                "Turn this into JSON: ",
                "Make JSON from this: ",
                "Convert to JSON: ",
                "JSON please: ",
                "Give me JSON for this sentence: ",
            )
        )
    return [lead + text, json.dumps(value)]


def facts(rng):
    kind = rng.randrange(6)
    if kind == 0:
        country, city = rng.choice(list(W.CAPITALS.items()))
        return [
            ask(rng, f"What is the capital of {country}?"),
            f"The capital of {country} is {city}.",
        ]
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
    if kind == 4:
        verb = rng.choice(("Name", "List", "Tell me"))
        return [ask(rng, f"{verb} {number} {group}."), listing(items) + "."]
    return [f"Make a list of {number} {group}.", "\n".join("- " + item for item in items)]


def casing(rng, text):
    """The same words as typed in a hurry, or shouted."""
    return rng.choice((text, text, text.lower(), text.lower(), text.upper()))


def greeting(rng):
    hello = rng.choice(
        """Hello|Hello|Hi|Hi|Hey|Good morning|Good afternoon|Good evening|Hello there|Hi there
Hey there""".replace("\n", "|").split("|")
    )
    end = rng.choice(("", "", "", "!", "!", ".", "!!", " :)", "?", ","))
    if rng.random() < 0.15:
        end = rng.choice((" Quire", " assistant", ", Quire", " friend", " again")) + end
    return [casing(rng, hello + end).rstrip(","), f"{hello}! How can I help you?"]


def who(rng):
    question = rng.choice(("Who are you?", "Who are you?", "What are you?", "What is your name?"))
    return [ask(rng, question), "I am the Quire demo, a very small language model."]


def smalltalk(rng):
    if rng.random() < 0.35:
        return greeting(rng)
    hello = rng.choice(("Hello", "Hi", "Hey"))
    name = person(rng)
    return rng.choice(
        (
            [
                casing(
                    rng, hello + rng.choice((", how are you?", " how are you?", "! How are you?"))
                ),
                "I am fine, thank you! How can I help you?",
            ],
            [ask(rng, "How are you?"), "I am fine, thank you! How are you?"],
            [ask(rng, "What can you do?"), CAN],
            [ask(rng, rng.choice(("Help.", "What do you know?", "How can you help me?"))), CAN],
            [ask(rng, "Thank you!"), "You are welcome!"],
            [
                ask(rng, rng.choice(("Thanks!", "Thanks a lot!", "Great, thanks.", "Nice!"))),
                "You are welcome!",
            ],
            [
                rng.choice(("Bye!", "Goodbye.", "bye", "See you later!")),
                "Goodbye! Have a nice day.",
            ],
            ["Good night!", "Good night! Sleep well."],
            who(rng),
            [
                rng.choice(
                    (
                        f"My name is {name}.",
                        f"my name is {name}",
                        f"I am {name}.",
                        f"I'm {name}",
                        f"Call me {name}.",
                        f"hi, i am {name}",
                        f"Hello, I am {name}.",
                        f"Hi, my name is {name}!",
                    )
                ),
                f"Hello {name}! How can I help you?",
            ],
        )
    )


def unknown(rng):
    topic = rng.choice(
        (
            made_up(rng),
            rng.choice(W.THINGS),
            "quantum physics",
            "the stock market",
            "machine learning",
            "history",
            "football",
            "the brain",
            "time",
            "music",
        )
    )
    return [
        ask(
            rng,
            rng.choice(
                (
                    f"Explain {topic}.",
                    f"What is {topic}?",
                    f"How does {topic} work?",
                    f"Who invented {topic}?",
                    "Write a Python function.",
                    f"Write code for {topic}.",
                    "What is the meaning of life?",
                    f"Why is {topic} important?",
                    "Who is the president?",
                    f"Translate {topic} into French.",
                    f"What is the price of {rng.choice(W.FOODS)}?",
                    f"Write a poem about {topic}.",
                    f"When was {topic} made?",
                    "What is the weather today?",
                    f"Who is {made_up(rng, True)}?",
                    f"What is {rng.randint(2, 99)} times {rng.randint(2, 99)}?",
                )
            ),
        ),
        rng.choice(UNKNOWN),
    ]


def remember(rng):
    """What the user said is asked for later, with something else in between."""
    kind, item = rng.choice(
        (
            ("name", person(rng)),
            ("color", rng.choice(W.COLORS)),
            ("animal", rng.choice(W.ANIMALS)),
            ("number", str(rng.randint(1, 99))),
        )
    )
    mine = "name" if kind == "name" else "favorite " + kind
    reply = f"I will remember that: {item}."
    if kind == "name":
        reply = f"Hello {item}! How can I help you?"
    between = []
    if rng.random() < 0.5:
        between = rng.choice((count, add, repeat, to_json, facts))(rng)
    return [
        f"My {mine} is {item}.",
        reply,
        *between,
        ask(rng, f"What is my {mine}?"),
        f"Your {mine} is {item}.",
    ]
