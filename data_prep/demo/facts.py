"""The demo base's pre-training text: declarative sentences about the classes of `knowledge`.

No sentence is a question, or uses a word of the instruction templates. Besides single facts there are groups, and
things in numbered places ("Box1: cow Box2: oak. the oak is in box2."): looking back for them gives a small model the
habit of tying a word to the number before it, which adapters can then build on.
"""

from __future__ import annotations

import random

from data_prep.demo.knowledge import KINDS, PEOPLE, noun

_PLACES = ("box", "bag", "room", "page", "door", "seat")


def fact_sentences(seed: int, count: int = 50_000) -> list[str]:
    """`count` sentences drawn from the classes, the same for the same seed; every fact is stated at least once."""
    rng = random.Random(f"facts-{seed}")
    sentences = [
        f"{noun(word)} {fact}." for kind in KINDS.values() for word in kind.members for fact in kind.facts
    ]
    while len(sentences) < count:
        draw = rng.random()
        make = _fact if draw < 0.3 else _group if draw < 0.4 else _numbered_places
        sentences.append(make(rng))
    rng.shuffle(sentences)
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _fact(rng: random.Random) -> str:
    kind = rng.choice(list(KINDS.values()))
    lead = rng.choice(("", "", "", f"{rng.choice(PEOPLE)} knows that "))
    return f"{lead}{noun(rng.choice(kind.members))} {rng.choice(kind.facts)}."


def _group(rng: random.Random) -> str:
    kind = rng.choice(list(KINDS.values()))
    return f"{', '.join(rng.sample(kind.members, 3))}: each {rng.choice(kind.facts)}."


def _numbered_places(rng: random.Random) -> str:
    """Things of different classes in places, then where some of them are, by name or by fact."""
    place = rng.choice(_PLACES)
    kinds = rng.sample(list(KINDS.values()), rng.randint(2, 5))
    things = [rng.choice(kind.members) for kind in kinds]
    listing = " ".join(f"{place.capitalize()}{i}: {thing}" for i, thing in enumerate(things, 1))
    clues = []
    for i in rng.choices(
        range(len(things)), k=len(things)
    ):  # with repeats, or the last would go by elimination
        pointer = f"the {things[i]}" if rng.random() < 0.4 else f"what {rng.choice(kinds[i].facts)}"
        clues.append(f"{pointer} is in {place}{i + 1}")
    return f"{listing}. {', '.join(clues)}."
