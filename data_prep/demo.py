"""A generated sample of the eight benchmarks in their raw hub columns, for the demo and for tests without a network.

The items ask for facts of `knowledge`. For every relation a quarter of the subjects is set aside: their facts are asked
about in the test splits only, so a model can answer a test item only from what its base knows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.knowledge import (
    ACTIVITIES,
    FEELING,
    HABITAT,
    MATERIAL,
    PEOPLE,
    RELATIONS,
    THINGS,
    USE,
    WORK,
    WORN,
    Relation,
    noun,
)

Row = dict[str, Any]
TEST_SHARE = 0.25
TRAIN_ROWS = 800
TEST_ROWS = 120
WINOGRANDE_SIZES = {"xs": 40, "s": 80, "m": 160, "l": 240, "xl": 200, "debiased": 80}


@dataclass(frozen=True)
class Item:
    """One choice: what is asked about, the options in order, and where the right one stands (from 0)."""

    relation: Relation
    subject: str
    value: str
    options: list[str]
    right: int


class Draw:
    """Draws the parts of items of one split; `number` counts the items, so that answers can take turns."""

    def __init__(self, seed: int, task: str, split: str) -> None:
        self.rng = random.Random(f"{task}-{split}-{seed}")
        self.seed, self.test = seed, split == "test"
        self.number = 0

    def turn(self, count: int) -> int:
        """The position of the right answer out of `count`."""
        return self.number % count

    def name(self) -> str:
        return self.rng.choice(PEOPLE)

    def held_out(self, relation: Relation, subject: str) -> bool:
        """Whether the fact is set aside for the test splits."""
        return random.Random(f"{self.seed}-{relation.name}-{subject}").random() < TEST_SHARE

    def subjects(self, relation: Relation, value: str) -> list[str]:
        """The subjects of `value` that this split may ask about; every value keeps at least one for training."""
        members = relation.groups[value]
        held = [s for s in members[1:] if self.held_out(relation, s)] or [members[-1]]
        return held if self.test else [s for s in members if s not in held]

    def fact(self, relations: tuple[Relation, ...]) -> tuple[Relation, str, str]:
        relation = self.rng.choice(relations)
        value = self.rng.choice([v for v in relation.values if len(relation.groups[v]) > 1])
        return relation, self.rng.choice(self.subjects(relation, value)), value

    def others(self, relation: Relation, value: str, count: int) -> list[str]:
        """`count` values other than `value`."""
        return self.rng.sample([other for other in relation.values if other != value], count)

    def item(self, relations: tuple[Relation, ...], count: int, of_values: bool = False) -> Item:
        """`count` options: subjects (with one right for the value), or values (with one right for the subject)."""
        relation, subject, value = self.fact(relations)
        others = self.others(relation, value, min(count, len(relation.values)) - 1)
        if not of_values:
            others = [noun(self.rng.choice(self.subjects(relation, other))) for other in others]
        right = self.turn(len(others) + 1)
        others.insert(right, value if of_values else noun(subject))
        return Item(relation, subject, value, others, right)


def _boolq(draw: Draw) -> Row:
    relation, subject, value = draw.fact(RELATIONS)
    answer = draw.turn(2) == 0
    claimed = value if answer else draw.others(relation, value, 1)[0]
    statement = f"{noun(subject)} {relation.predicate(claimed)}"
    question = draw.rng.choice(
        (
            relation.claim.format(s=noun(subject), v=claimed),
            f"can one say that {statement}",
            f"is it known that {statement}",
        )
    )
    return {
        "question": question,
        "answer": answer,
        "passage": f"{noun(subject)} {relation.predicate(value)}.".capitalize(),
    }


def _piqa(draw: Draw) -> Row:
    item = draw.item((USE, MATERIAL, WORN, HABITAT), 2)
    goal = {
        "use": f"To {item.value}, ",
        "material": f"To get something made of {item.value},",
        "worn": f"To put something on {item.value.removeprefix('on ')},",
        "habitat": f"To see what lives {item.value},",
    }[item.relation.name]
    first, second = (f"look for {option}." for option in item.options)
    return {"goal": goal.strip(), "sol1": first, "sol2": second, "label": item.right}


def _social_i_qa(draw: Draw) -> Row:
    item = draw.item((FEELING, FEELING, WORK), 3, of_values=True)
    name = draw.name()
    if item.relation is FEELING:
        context = f"{name} {item.subject.removeprefix('someone who ')}."
        question = f"How would {name} feel as a result?"
    else:
        context = f"{name} is {noun(item.subject)}."
        question = f"Where does {name} work?"
        item = Item(
            item.relation, item.subject, item.value, [f"in {option}" for option in item.options], item.right
        )
    a, b, c = item.options
    return {
        "context": context,
        "question": question,
        "answerA": a,
        "answerB": b,
        "answerC": c,
        "label": str(item.right + 1),
    }


def _hellaswag(draw: Draw) -> Row:
    activities = draw.rng.sample(ACTIVITIES, 4)
    right = draw.turn(4)
    chosen = activities[right]
    tools = chosen.tools[-1:] if draw.test else chosen.tools[:-1]
    who = draw.rng.choice(("man", "woman", "boy", "girl", "person"))
    ctx_a = f"A {who} takes {noun(draw.rng.choice(tools))}."
    ctx_b = draw.rng.choice(("he", "she", "then the person"))
    return {
        "ind": draw.rng.randrange(10_000),
        "activity_label": chosen.name,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": [draw.rng.choice(activity.actions) + "." for activity in activities],
        "source_id": "demo",
        "split": "val" if draw.test else "train",
        "split_type": "indomain",
        "label": str(right),
    }


def _winogrande(draw: Draw) -> Row:
    item = draw.item(THINGS, 2)
    first, second = item.options if draw.rng.random() < 0.5 else item.options[::-1]
    sentence = f"{draw.name()} thought of {first} and {second}; the _ {item.relation.predicate(item.value)}."
    one, two = (option.split(" ", 1)[1] for option in item.options)
    return {"sentence": sentence, "option1": one, "option2": two, "answer": str(item.right + 1)}


def _choices(item: Item, number: int, numeric: bool) -> Row:
    labels = [str(i + 1) if numeric else "ABCDE"[i] for i in range(len(item.options))]
    return {
        "id": f"demo-{number}",
        "choices": {"text": item.options, "label": labels},
        "answerKey": labels[item.right],
    }


def _count(draw: Draw) -> int:
    """Mostly 4 choices, now and then 3 or 5, as in ARC."""
    return draw.rng.choice((3, 4, 4, 4, 4, 5))


def _arc_easy(draw: Draw) -> Row:
    item = draw.item(THINGS, _count(draw))
    question = f"Which of these {item.relation.predicate(item.value)}?"
    return {"question": question, **_choices(item, draw.rng.randrange(10**9), draw.rng.random() < 0.1)}


def _arc_challenge(draw: Draw) -> Row:
    item = draw.item(THINGS, _count(draw))
    peers = [s for s in item.relation.groups[item.value] if s != item.subject]
    question = f"Which of these {item.relation.same} {noun(draw.rng.choice(peers))}?"
    return {"question": question, **_choices(item, draw.rng.randrange(10**9), draw.rng.random() < 0.1)}


def _openbookqa(draw: Draw) -> Row:
    item = draw.item(THINGS, 4, of_values=True)
    stem = f"{noun(item.subject)} {item.relation.verb}".capitalize()
    return {"question_stem": stem, **_choices(item, draw.rng.randrange(10**9), False)}


_MAKERS: dict[str, tuple[Callable[[Draw], Row], str]] = {
    "boolq": (_boolq, "validation"),
    "piqa": (_piqa, "validation"),
    "social_i_qa": (_social_i_qa, "validation"),
    "hellaswag": (_hellaswag, "validation"),
    "winogrande": (_winogrande, "validation"),
    "ARC-Easy": (_arc_easy, "test"),
    "ARC-Challenge": (_arc_challenge, "test"),
    "openbookqa": (_openbookqa, "test"),
}


def _rows(seed: int, task: str, split: str, count: int) -> Iterator[Row]:
    """Up to `count` rows, no two of which differ only in their id."""
    make, seen = _MAKERS[task][0], set()
    draw = Draw(seed, task, split)
    for _ in range(50 * count):
        row = make(draw)
        text = json.dumps({key: value for key, value in row.items() if key not in ("id", "ind")})
        if text not in seen:
            seen.add(text)
            draw.number = len(seen)
            yield row
        if len(seen) == count:
            return


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_raw(folder: Path, seed: int) -> None:
    """Write `<task>/<split>.jsonl` for all eight tasks, as a local source of `data_prep`."""
    for task, (_, test_split) in _MAKERS.items():
        _write(folder / task / f"{test_split}.jsonl", list(_rows(seed, task, "test", TEST_ROWS)))
        rows = list(_rows(seed, task, "train", TRAIN_ROWS))
        if task != "winogrande":
            _write(folder / task / "train.jsonl", rows)
            continue
        for size, count in WINOGRANDE_SIZES.items():
            _write(folder / task / f"train_{size}.jsonl", rows[:count])
            rows = rows[count:]
