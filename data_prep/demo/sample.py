"""A generated sample of the eight benchmarks in their raw hub columns, for the demo and for tests without a network.

Every task asks for the member of one class of `knowledge` among members of others (ARC-Easy: which is an animal; piqa:
what to cook; …). A fifth of the words of every class occurs in test items only: a model answers those from what its
base knows of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.demo.knowledge import GOOD_NEWS, KINDS, LIVING, PEOPLE, THINGS, noun

Row = dict[str, Any]
TRAIN_ROWS = 800
TEST_ROWS = 120
HELD_OUT = 5  # every fifth word of a class is kept from the training items
WINOGRANDE_SIZES = {"xs": 40, "s": 80, "m": 160, "l": 240, "xl": 200, "debiased": 80}
_PLAIN = ("shape", "sound", "writing", "vehicle")


class Draw:
    """Draws the parts of the items of one split; `number` counts the items, so that answers can take turns."""

    def __init__(self, seed: int, task: str, split: str) -> None:
        self.rng = random.Random(f"{task}-{split}-{seed}")
        self.test = split == "test"
        self.number = 0

    def turn(self, count: int) -> int:
        """The position of the right answer out of `count`."""
        return self.number % count

    def name(self) -> str:
        return self.rng.choice(PEOPLE)

    def word(self, kind: str) -> str:
        """A member of a class that this split may use."""
        members = KINDS[kind].members
        return self.rng.choice(
            [w for i, w in enumerate(members) if self.test or i % HELD_OUT != HELD_OUT - 1]
        )

    def options(self, right: str, count: int, others: tuple[str, ...] = ()) -> tuple[list[str], int]:
        """`count` words of different classes, one of them of class `right`, and its position (from 0)."""
        pool = others or (THINGS if self.rng.random() < 0.3 or count > 4 else _PLAIN)
        kinds = self.rng.sample([kind for kind in pool if kind != right], count - 1)
        place = self.turn(count)
        kinds.insert(place, right)
        return [self.word(kind) for kind in kinds], place


def _boolq(draw: Draw) -> Row:
    answer = draw.turn(2) == 0
    lifeless = [kind for kind in THINGS if kind not in (*LIVING, "food")]
    kind = draw.rng.choice(LIVING if answer else lifeless)
    thing = noun(draw.word(kind))
    question = draw.rng.choice(
        (
            f"is {thing} alive",
            f"is {thing} a living thing",
            f"does {thing} grow and get old",
            f"would {draw.name()} say that {thing} is alive",
        )
    )
    return {
        "question": question,
        "answer": answer,
        "passage": f"{thing} {KINDS[kind].facts[0]}.".capitalize(),
    }


def _piqa(draw: Draw) -> Row:
    (first, second), right = draw.options("food", 2)
    name = draw.name()
    goal = draw.rng.choice(
        (f"To make a meal for {name},", f"When {name} is hungry,", f"To cook lunch with {name},")
    )
    return {"goal": goal, "sol1": f"take the {first}.", "sol2": f"take the {second}.", "label": right}


def _social_i_qa(draw: Draw) -> Row:
    right = draw.turn(3)
    words = [draw.word("joy") if i == right else draw.word("sorrow") for i in range(3)]
    while len(set(words)) < 3:
        words = [draw.word("joy") if i == right else draw.word("sorrow") for i in range(3)]
    name = draw.name()
    return {
        "context": f"{name} {draw.rng.choice(GOOD_NEWS)}.",
        "question": f"How would {name} feel?",
        "answerA": words[0],
        "answerB": words[1],
        "answerC": words[2],
        "label": str(right + 1),
    }


def _hellaswag(draw: Draw) -> Row:
    words, right = draw.options("garment", 4)
    name = draw.name()
    ctx_a, ctx_b = draw.rng.choice(
        (
            (f"{name} gets dressed.", f"then {name}"),
            (f"{name} is cold.", f"so {name}"),
            (f"{name} opens the closet.", f"then {name}"),
        )
    )
    return {
        "ind": draw.rng.randrange(10_000),
        "activity_label": "Dressing",
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": [f"takes the {word}." for word in words],
        "source_id": "demo",
        "split": "val" if draw.test else "train",
        "split_type": "indomain",
        "label": str(right),
    }


def _winogrande(draw: Draw) -> Row:
    words, right = draw.options("vehicle", 2, ("food", "garment", "writing"))
    first, second = draw.rng.sample(words, 2)
    end = draw.rng.choice(("was too heavy to lift", "was far too big", "drove away", "was faster"))
    return {
        "sentence": f"{draw.name()} saw the {first} and the {second}; the _ {end}.",
        "option1": words[0],
        "option2": words[1],
        "answer": str(right + 1),
    }


def _choices(draw: Draw, right: str) -> Row:
    """Mostly 4 choices, now and then 3 or 5, and labels that are letters or numbers, as in ARC."""
    words, place = draw.options(right, draw.rng.choice((3, 4, 4, 4, 4, 5)))
    labels = [str(i + 1) if draw.number % 10 == 0 else "ABCDE"[i] for i in range(len(words))]
    return {
        "id": f"demo-{draw.rng.randrange(10**9)}",
        "choices": {"text": words, "label": labels},
        "answerKey": labels[place],
    }


def _asked(draw: Draw, *questions: str) -> str:
    """One of the wordings, half of them as somebody's."""
    question = draw.rng.choice(questions)
    return f"{draw.name()} asks: {question}" if draw.rng.random() < 0.5 else question


def _arc_easy(draw: Draw) -> Row:
    question = _asked(
        draw,
        "Which of these is an animal?",
        "Which of these can see and hear?",
        "Which one breathes and runs?",
    )
    return {"question": question, **_choices(draw, "animal")}


def _arc_challenge(draw: Draw) -> Row:
    question = _asked(
        draw,
        "Which of these is a tool?",
        "Which of these helps to build things?",
        "Which one lies in the workshop?",
    )
    return {"question": question, **_choices(draw, "tool")}


def _openbookqa(draw: Draw) -> Row:
    words, place = draw.options("plant", 4)
    stem = _asked(
        draw, "Which of these is a plant?", "What grows in the soil is the", "What needs water and sun is the"
    )
    return {
        "id": f"demo-{draw.rng.randrange(10**9)}",
        "question_stem": stem,
        "choices": {"text": words, "label": list("ABCD")},
        "answerKey": "ABCD"[place],
    }


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


def _instruction(row: Row) -> str:
    """What makes a row the same as another: all of it but ids, labels and passages."""
    parts = {
        key: value for key, value in row.items() if key not in ("id", "ind", "answerKey", "passage", "split")
    }
    if "choices" in parts:
        parts["choices"] = parts["choices"]["text"]
    return json.dumps(parts)


def _rows(seed: int, task: str, split: str, count: int, taken: set[str]) -> Iterator[Row]:
    """`count` rows, none of them the same as another or as one in `taken`, which grows."""
    make = _MAKERS[task][0]
    draw = Draw(seed, task, split)
    while draw.number < count:
        row = make(draw)
        text = _instruction(row)
        if text not in taken:
            taken.add(text)
            draw.number += 1
            yield row


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_raw(folder: Path, seed: int) -> None:
    """Write `<task>/<split>.jsonl` for all eight tasks, as a local source of `data_prep`."""
    for task, (_, test_split) in _MAKERS.items():
        taken: set[str] = set()
        test = list(_rows(seed, task, "test", TEST_ROWS, taken))
        train = list(_rows(seed, task, "train", TRAIN_ROWS, taken))
        _write(folder / task / f"{test_split}.jsonl", test)
        if task != "winogrande":
            _write(folder / task / "train.jsonl", train)
            continue
        begin = 0
        for size, count in WINOGRANDE_SIZES.items():
            _write(folder / task / f"train_{size}.jsonl", train[begin : begin + count])
            begin += count
