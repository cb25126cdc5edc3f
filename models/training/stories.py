"""The story grammar: a cast of characters, put into the plots of `plots.py`."""

import random
import re

import words as W
from plots import OPENINGS, PLOTS

SYLLABLES = """ba be bi bo da de do fa fi ga go ha ji ka ke ki la le li lo ma mi mo na ne no pa pe
po ra ri ro sa se si so ta te ti to va ve vo wa ya yo za zi zo lan bel dor fen gim kas lor mer nil
per quin ros sten tor vin wick zan""".split()
# Sounds to begin a syllable, vowels, and sounds to end it.
BEGIN = """b b bl br c ch cl cr d d dr f fl fr g gl gr h j k l m m n n p p pl pr qu r r s sc sh sk
sl sm sn sp st str sw t t th tr tw v w wh y z""".split()
VOWELS = "a a a e e e i i i o o o u u ai ay ea ee ie oa oo ou y".split()
FINISH = "b ck d f g k l ll m n n nd ng nk nt p r r rd rk rt s s sh ss st t t tch x".split()


def made_up(rng, upper=False):
    """A word that means nothing, so that copying is learnt for words outside the lists as well."""
    if rng.random() < 0.4:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    else:
        word = "".join(
            rng.choice(BEGIN)
            + rng.choice(VOWELS)
            + (rng.choice(FINISH) if rng.random() < 0.6 else "")
            for _ in range(rng.choice((1, 1, 2, 2)))
        )
        word = word if len(word) > 2 else word + rng.choice("bdgmnpt")
    return word.capitalize() if upper else word


def a(word):
    return ("an " if word[0] in "aeiou" and not word.startswith("uni") else "a ") + word


def character(rng, other=None):
    """A kind of creature, a name that fits it, and its pronouns; `other` is who it is to meet.

    Many animals have their usual name, and many heroes their usual friend. Were all names equally
    likely, the likeliest name for the friend would be the only one that stands out: the hero's.
    """
    names = W.GIRLS + W.BOYS
    kind = rng.choice(
        rng.choices(
            (W.ANIMALS, W.WOMEN + W.MEN, W.PEOPLE, [made_up(rng)]), (73, 12, 6, 3 if other else 9)
        )[0]
    )
    usual = names[W.ANIMALS.index(kind) * 7 % len(names)] if kind in W.ANIMALS else None
    if other:
        if other[0] in W.ANIMALS and rng.random() < 0.4:
            kind = W.ANIMALS[W.ANIMALS.index(other[0]) - 1]
        usual = names[names.index(other[1]) - len(W.GIRLS)] if other[1] in names else "Mia"
    if usual and rng.random() < 0.4 and kind not in W.WOMEN + W.MEN:
        name, female = usual, usual in W.GIRLS
    else:
        female = kind in W.WOMEN or (kind not in W.MEN and rng.random() < 0.5)
        made = rng.random() < (0.1 if other else 0.25)
        name = made_up(rng, True) if made else rng.choice(W.GIRLS if female else W.BOYS)
    if other and (kind == other[0] or name == other[1]):
        return character(rng, other)
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return kind, name, he, him, his


def cast(rng):
    """Every variable a plot may use."""
    kind, hero, he, him, his = character(rng)
    fkind, friend, fhe, fhim, fhis = character(rng, (kind, hero))
    place = rng.choice(list(W.PLACES))
    place_adj = rng.choice(W.PLACE_ADJECTIVES)
    adj = rng.choice(W.ADJECTIVES)
    thing = made_up(rng) if rng.random() < 0.1 else rng.choice(W.THINGS)
    color = rng.choice(W.COLORS)
    food, food2 = rng.sample(W.FOODS, 2)
    v = {
        "kind": kind,
        "hero": hero,
        "he": he,
        "him": him,
        "his": his,
        "adj": adj,
        "fkind": fkind,
        "friend": friend,
        "fhe": fhe,
        "fhim": fhim,
        "fhis": fhis,
        "place": place,
        "thing": thing,
        "color": color,
        "food": food,
        "food2": food2,
        "spot": rng.choice(W.SPOTS),
        "weather": rng.choice(W.WEATHER),
        "time": rng.choice(W.TIMES),
        "crop": rng.choice(W.CROPS),
        "soup": rng.choice(W.WARM_FOODS),
        "n": str(rng.randint(2, 9)),
        "a_adj": a(adj),
        "a_kind": a(kind),
        "a_fkind": a(fkind),
        "a_color": a(color),
        "a_thing": a(thing),
        "at_place": W.PLACES[place] + " the " + place,
        "live": f"{W.PLACES[place]} {a(place_adj)} {place}",
    }
    for key in ("he", "his", "fhe", "fhis"):
        v[key.capitalize()] = v[key].capitalize()
    return v


def fill(rng, text, v):
    """Choose among `[a|b]` and put the cast in."""
    text = re.sub(r"\[([^\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)
    return text.format(**v)


def story(rng, short=False):
    """One story: (its text, its cast, [(question, answer), ...], the plot's template)."""
    v = cast(rng)
    plot, questions = PLOTS[rng.choice(list(PLOTS))]
    v["slowly"] = rng.choice(("slowly", "alone"))
    lines = [
        line
        for line in plot.strip().split("\n")
        if line[0] != "?" or (not short and rng.random() < 0.6)
    ]
    sentences = [fill(rng, rng.choice(OPENINGS), v)]
    sentences += [fill(rng, line.lstrip("?").strip(), v) for line in lines]
    if short:
        text = " ".join(sentences)
    else:  # three paragraphs: how things are, what happens, how it ends
        cut = 1 + len(lines) // 3, 1 + 2 * len(lines) // 3
        text = "\n\n".join(
            " ".join(p)
            for p in (sentences[: cut[0]], sentences[cut[0] : cut[1]], sentences[cut[1] :])
        )
    qa = [
        tuple(fill(rng, part, v) for part in line.split("|"))
        for line in questions.strip().split("\n")
    ]
    qa += [
        (f"What is the name of the {v['kind']}?", f"The {v['kind']} is named {v['hero']}."),
        (f"Where did {v['hero']} live?", f"{v['hero']} lived {v['live']}."),
        (f"Who is {v['hero']}?", f"{v['hero']} is {v['a_adj']} {v['kind']}."),
    ]
    return text, v, qa, plot


def story_request(rng, v, plot):
    """A wish for a story that the story with cast `v` and this plot fulfils."""
    subjects = [
        "{a_kind}",
        "{a_kind}",
        "{a_kind}",
        "{a_kind} named {hero}",
        "{a_adj} {kind}",
        "{hero} the {kind}",
        "{a_kind} who lives {live}",
    ]
    if "{friend}" in plot:
        subjects += ["{a_kind} and {a_fkind}", "{hero} and {friend}"]
    if "{thing}" in plot:
        subjects += ["{a_kind} and {a_thing}", "{a_color} {thing}"]
    subject = rng.choice(subjects).format(**v)
    return rng.choice(
        (
            f"Tell me a story about {subject}.",
            f"Tell me a story about {subject}.",
            f"Write a story about {subject}.",
            f"Can you tell me a story about {subject}?",
            f"Make up a story about {subject}.",
            f"I want to hear a story about {subject}.",
            f"I would like a story about {subject}.",
            f"A story about {subject}, please.",
            f"Please write a story about {subject}.",
            f"Could you write me a story about {subject}?",
        )
    )


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(3):
        text, v, qa, plot = story(rng)
        print(story_request(rng, v, plot), text, *qa, sep="\n", end="\n\n")
