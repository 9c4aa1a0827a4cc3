"""The generated sample: raw rows of eight tasks, and the fact sentences that a base learns from."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from data_prep.demo.facts import fact_sentences
from data_prep.demo.knowledge import KINDS, noun
from data_prep.demo.sample import write_raw
from data_prep.tasks import TASKS

COLUMNS = {
    "boolq": {"question", "answer", "passage"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "social_i_qa": {"context", "question", "answerA", "answerB", "answerC", "label"},
    "hellaswag": {
        *(
            "ind",
            "activity_label",
            "ctx_a",
            "ctx_b",
            "ctx",
            "endings",
            "source_id",
            "split",
            "split_type",
            "label",
        )
    },
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "ARC-Easy": {"id", "question", "choices", "answerKey"},
    "ARC-Challenge": {"id", "question", "choices", "answerKey"},
    "openbookqa": {"id", "question_stem", "choices", "answerKey"},
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, 42)
    return folder


def records(raw: Path, task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the test records of a task."""
    spec = TASKS[task]
    train = [
        dict(spec.record(row)) for split in spec.train for row in read(raw / task / f"{split.file}.jsonl")
    ]
    return train, [dict(spec.record(row)) for row in read(raw / task / f"{spec.test.file}.jsonl")]


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_hub_columns(raw: Path, task: str) -> None:
    for file in (raw / task).iterdir():
        assert {frozenset(row) for row in read(file)} == {frozenset(COLUMNS[task])}


@pytest.mark.parametrize("task", TASKS)
def test_no_test_instruction_occurs_in_training_and_none_twice(raw: Path, task: str) -> None:
    train, test = ([record["instruction"] for record in side] for side in records(raw, task))
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) >= 400
    assert len(set(test)) == len(test) >= 100


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_balanced(raw: Path, task: str) -> None:
    for side in records(raw, task):
        options = Counter(record["instruction"].count("/") + 1 for record in side)
        for count, items in options.items():
            answers = Counter(r["answer"] for r in side if r["instruction"].count("/") + 1 == count)
            share = items / count
            assert len(answers) == count
            assert max(abs(n - share) for n in answers.values()) <= max(2, 4 * share**0.5)


def test_arc_has_items_of_three_and_five_choices_and_numeric_labels(raw: Path) -> None:
    for task, split in product(("ARC-Easy", "ARC-Challenge"), ("train", "test")):
        rows = read(raw / task / f"{split}.jsonl")
        assert {len(row["choices"]["label"]) for row in rows} == {3, 4, 5}
        assert {row["choices"]["label"][0] for row in rows} == {"A", "1"}


def test_winogrande_has_its_six_configurations(raw: Path) -> None:
    names = {path.stem for path in (raw / "winogrande").iterdir()}
    assert names == {"validation", *(f"train_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased"))}


def test_no_word_is_in_two_classes() -> None:
    words = [word for kind in KINDS.values() for word in kind.members]
    assert len(words) == len(set(words))


RIGHT = {"piqa": "food", "hellaswag": "garment", "winogrande": "vehicle", "openbookqa": "plant"} | {
    "ARC-Easy": "animal",
    "ARC-Challenge": "tool",
    "social_i_qa": "joy",
}


@pytest.mark.parametrize("task", RIGHT)
def test_exactly_the_right_option_is_of_the_class(raw: Path, task: str) -> None:
    members = KINDS[RIGHT[task]].members
    for side in records(raw, task):
        for record in side:
            options = re.findall(
                r"(?:Answer|Solution|Ending|Option)\d: (?:takes? the )?(\w+)", record["instruction"]
            )
            assert [option in members for option in options] == [
                record["answer"].endswith(str(i)) for i in range(1, len(options) + 1)
            ]


@pytest.mark.parametrize("task", RIGHT)
def test_some_words_occur_in_the_test_only(raw: Path, task: str) -> None:
    words = [set(re.findall(r"\w+", " ".join(r["instruction"] for r in side))) for side in records(raw, task)]
    fresh = (words[1] - words[0]) & {word for kind in KINDS.values() for word in kind.members}
    assert len(fresh) >= 3


def test_the_same_seed_gives_the_same_rows(raw: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "same", 42)
    write_raw(tmp_path / "other", 43)
    files = [path.relative_to(raw) for path in raw.rglob("*.jsonl")]
    assert all((tmp_path / "same" / f).read_bytes() == (raw / f).read_bytes() for f in files)
    assert all((tmp_path / "other" / f).read_bytes() != (raw / f).read_bytes() for f in files)


def test_sentences_state_every_fact_and_never_use_a_template() -> None:
    sentences = fact_sentences(42)
    text = "\n".join(sentences).lower()
    assert fact_sentences(42) == sentences != fact_sentences(43)
    for word in (
        "question",
        "answer",
        "solution",
        "option",
        "ending",
        "true",
        "false",
        "choose",
        "correct",
        "?",
    ):
        assert not re.search(rf"\b{re.escape(word)}\b" if word != "?" else r"\?", text), word
    for kind in KINDS.values():
        for word in kind.members:
            for fact in kind.facts:
                assert f"{noun(word)} {fact}" in text, (word, fact)
