"""Raw rows of all eight tasks in the hub's columns, made for the tests, with the quirks of the real ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def _social(context: str, question: str, answers: tuple[str, str, str], label: str) -> dict[str, Any]:
    a, b, c = answers
    return {
        "context": context,
        "question": question,
        "answerA": a,
        "answerB": b,
        "answerC": c,
        "label": label,
    }


def _keyed(stem: str, text: str, options: list[str], labels: str, key: str) -> dict[str, Any]:
    return {"id": "x", stem: text, "choices": {"text": options, "label": list(labels)}, "answerKey": key}


ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": "is ice colder than\u200b steam", "answer": True, "passage": "not used"},
        {"question": "is a \ufffc stone soft", "answer": False, "passage": ""},
    ],
    "piqa": [
        {"goal": "Dry a  cup ", "sol1": "use a towel ", "sol2": "use  a lake", "label": 0},
        {"goal": "Light a room", "sol1": "close the door", "sol2": "switch on a lamp", "label": 1},
    ],
    "social_i_qa": [  # a duplicate, as in the real test set
        _social("Kim fell.", "What next?", ("get up", "fly", "sing"), "1"),
        _social("Kim fell.", "What next?", ("get up", "fly", "sing"), "1"),
        _social("Jo won.", "How is Jo?", ("sad", "lost", "glad"), "3"),
    ],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Baking",
            "ctx": "[header] How to bake [title] Mix. she",
            "ctx_a": "x",
            "ctx_b": "y",
            "endings": ['eats "it".', ", stirs.", "sleeps", "runs away\n"],
            "label": "1",
        },
    ],
    "ARC-Easy": [  # 3 choices; numeric labels
        _keyed("question", "Which is hot?", ["ice", "fire", "snow"], "ABC", "B"),
        _keyed("question", "At 5°, what?", ["i", "j", "k", "l"], "1234", "4"),
    ],
    "ARC-Challenge": [_keyed("question", "Pick", ["a", "b", "c", "d", "e"], "ABCDE", "E")],
    "openbookqa": [
        _keyed("question_stem", "The sun is", ["a star", "a fish", "a car", "a hat"], "ABCD", "A")
    ],
}

WINOGRANDE_PARTS = ("xs", "s", "m", "l", "xl", "debiased")


def winogrande(part: str) -> list[dict[str, Any]]:
    """Rows of one configuration; the first of each is the same, as in the real parts."""
    again = {
        "sentence": "The cat sat on the mat as the _ was warm.",
        "option1": "cat",
        "option2": "mat",
        "answer": "2",
    }
    own = {"sentence": f"{part} _ won.", "option1": part * 2, "option2": "other", "answer": "1"}
    return [again, own]


def write_raw(folder: Path, packed: bool = False) -> Path:
    """A local source with every split of every task."""
    for task, rows in ROWS.items():
        for split in ("train", "validation", "test"):
            write_split(folder, task, split, rows, packed)
    for part in WINOGRANDE_PARTS:
        write_split(folder, "winogrande", f"train_{part}", winogrande(part), packed)
    write_split(folder, "winogrande", "validation", winogrande("validation"), packed)
    return folder


def write_split(
    folder: Path, task: str, split: str, rows: list[dict[str, Any]], packed: bool = False
) -> None:
    path = folder / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if packed:
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
