"""The demo base's pre-training text: declarative sentences about the tables of `knowledge`.

No sentence is a question, offers lettered or numbered answers, or uses a word of the instruction templates' answers.
Besides single facts there are lists, contrasts, comparisons and two-line stories ("Box 1 holds a cow, box 2 holds a
whale. Tom wants the one that lives in the sea and opens box 2."): they give a small model the habits of looking back
and of relating words through what it knows, which adapters can then build on.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data_prep.knowledge import ACTIVITIES, FEELING, PEOPLE, RELATIONS, Relation, noun

_PLACES = ("box", "bag", "room", "page", "door", "seat")
_SHARES = ((0.3, "fact"), (0.08, "link"), (0.54, "list"), (0.08, "activity"))


def fact_sentences(seed: int, count: int = 60_000) -> list[str]:
    """`count` sentences drawn from the tables, the same for the same seed."""
    rng = random.Random(f"facts-{seed}")
    makers = {"fact": _FACTS, "link": _LINKS, "list": _NUMBERED, "activity": _ACTIVITY}
    kinds = rng.choices([kind for _, kind in _SHARES], [share for share, _ in _SHARES], k=count)
    return [_sentence(rng.choice(makers[kind])(rng)) for kind in kinds]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _draw(rng: random.Random) -> tuple[Relation, str, str]:
    relation = rng.choice(RELATIONS)
    subject, value = rng.choice(list(relation.value_of.items()))
    return relation, subject, value


def _other(rng: random.Random, relation: Relation, value: str) -> str:
    return rng.choice([other for other in relation.values if other != value])


def _peer(rng: random.Random, relation: Relation, value: str) -> str:
    return rng.choice(relation.groups[value])


def _options(
    rng: random.Random, relation: Relation, value: str, subject: str
) -> tuple[list[str], list[str], int]:
    """2 to 5 subjects with different values, those values, and where `subject` stands (from 0)."""
    count = min(rng.choice((2, 3, 4, 4, 5)), len(relation.values))
    values = [value, *rng.sample([other for other in relation.values if other != value], count - 1)]
    rng.shuffle(values)
    place = values.index(value)
    subjects = [subject if other == value else _peer(rng, relation, other) for other in values]
    return subjects, values, place


def _plain(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    lead = rng.choice(("", "", f"{rng.choice(PEOPLE)} knows that ", "as we know, "))
    return f"{lead}{noun(subject)} {relation.predicate(value)}."


def _never(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    return f"{noun(subject)} {relation.predicate(value)}, never {_other(rng, relation, value)}."


def _inverse(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    return f"the one that {relation.predicate(value)} is {noun(subject)}."


def _contrast(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    other = _other(rng, relation, value)
    peer = noun(_peer(rng, relation, other))
    return f"{noun(subject)} {relation.predicate(value)}, but {peer} {relation.predicate(other)}."


def _list(rng: random.Random) -> str:
    relation, _, value = _draw(rng)
    members = rng.sample(relation.groups[value], min(3, len(relation.groups[value])))
    return f"{', '.join(map(noun, members))}: each {relation.predicate(value)}."


def _comparison(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    return f"{noun(subject)} {relation.same} {noun(_peer(rng, relation, value))}."


def _listed(rng: random.Random, things: list[str]) -> tuple[str, str]:
    """`Box1: cow Box2: whale` and the name of the place, `box`."""
    place = rng.choice(_PLACES)
    return " ".join(f"{place.capitalize()}{i}: {thing}" for i, thing in enumerate(things, 1)), place


def _clue(rng: random.Random, relation: Relation, subject: str, value: str, names: float = 0.4) -> str:
    """One of three ways to point at a subject: by its name, by its fact, by another one like it."""
    kind = rng.random()
    if kind < names:
        return f"the {subject}" if relation is not FEELING else subject
    if kind < 0.8:
        return f"what {relation.predicate(value)}"
    return f"what {relation.same} {noun(_peer(rng, relation, value))}"


def _list_then_clues(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    subjects, values, _ = _options(rng, relation, value, subject)
    listing, place = _listed(rng, subjects)
    order = rng.choices(
        range(len(subjects)), k=len(subjects)
    )  # with repeats, or the last would go by elimination
    clues = [f"{_clue(rng, relation, subjects[i], values[i])} is in {place}{i + 1}" for i in order]
    return f"{listing}. {', '.join(clues)}."


def _search(rng: random.Random, lead: str, options: list[str], where: int, looks: float = 0.5) -> str:
    """Someone goes through numbered places; with probability `looks` it is said of each whether it fits."""
    place = rng.choice(_PLACES)
    says = rng.random() < looks
    verdicts = [(", yes." if i == where else ", no.") if says else "" for i in range(len(options))]
    listing = " ".join(
        f"{place.capitalize()}{i}: {option}{verdict}"
        for i, (option, verdict) in enumerate(zip(options, verdicts, strict=True), 1)
    )
    return f"{lead}. {listing.removesuffix('.')}. it is in {place}{where + 1}."


def _clue_then_list(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    subjects, _, where = _options(rng, relation, value, subject)
    clue = _clue(rng, relation, subject, value, names=0.2)
    return _search(rng, f"{rng.choice(PEOPLE)} seeks {clue}", subjects, where)


def _value_list(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    _, values, where = _options(rng, relation, value, subject)
    return _search(rng, f"{noun(subject)} {relation.verb} one of these", values, where)


def _check(rng: random.Random) -> str:
    relation, subject, value = _draw(rng)
    fits = rng.random() < 0.5
    wanted = value if fits else _other(rng, relation, value)
    person = rng.choice(PEOPLE)
    end = "takes it" if fits else "goes on"
    return f"{person} wants the one that {relation.predicate(wanted)}, finds {noun(subject)} and {end}."


def _activity_fact(rng: random.Random) -> str:
    activity = rng.choice(ACTIVITIES)
    tool, action = rng.choice(activity.tools), rng.choice(activity.actions)
    return rng.choice(
        (
            f"in {activity.name.lower()}, one takes {noun(tool)} and {action}.",
            f"{noun(tool)} is needed for {activity.name.lower()}.",
            f"{rng.choice(PEOPLE)} takes {noun(tool)} and {action}.",
            f"whoever {action} likes {activity.name.lower()}.",
        )
    )


def _activity_list(rng: random.Random) -> str:
    picked = rng.sample(ACTIVITIES, rng.choice((2, 3, 4)))
    where = rng.randrange(len(picked))
    lead = f"{rng.choice(PEOPLE)} takes {noun(rng.choice(picked[where].tools))}"
    return _search(rng, lead, [rng.choice(activity.actions) for activity in picked], where)


_Makers = tuple[Callable[[random.Random], str], ...]
_FACTS: _Makers = (_plain, _plain, _never, _inverse)
_LINKS: _Makers = (_contrast, _list, _comparison)
_NUMBERED: _Makers = (_list_then_clues, _clue_then_list, _clue_then_list, _value_list, _check)
_ACTIVITY: _Makers = (_activity_fact, _activity_fact, _activity_list)
