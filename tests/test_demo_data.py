"""The generated sample: raw rows of eight tasks, and the fact sentences that a base learns from."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from data_prep.demo import write_raw
from data_prep.facts import fact_sentences
from data_prep.knowledge import RELATIONS, THINGS, noun
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


@pytest.mark.parametrize("task", ["ARC-Easy", "openbookqa"])
def test_facts_asked_about_in_the_test_are_not_asked_about_in_training(raw: Path, task: str) -> None:
    def facts(side: list[dict[str, Any]]) -> set[tuple[str, str]]:
        """(subject, value) of every relation that links the question to the right option."""
        found = set()
        for record in side:
            number = record["answer"].removeprefix("answer")
            right = re.split(rf" ?Answer{number}: | Answer\d: |\n\nAnswer format", record["instruction"])
            text = f"{record['instruction'].splitlines()[0]} {right[int(number)]}"
            found |= {
                (relation.name, subject)
                for relation in THINGS
                for subject, value in relation.value_of.items()
                if re.search(rf"\b{subject}\b", text) and value in text and relation.verb in text
            }
        return found

    train, test = (facts(side) for side in records(raw, task))
    assert len(test) >= 20
    assert not train & test


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
    for relation in RELATIONS:
        for subject, value in relation.value_of.items():
            assert f"{noun(subject)} {relation.predicate(value)}" in text, (subject, value)


def test_no_instruction_is_among_the_sentences(raw: Path) -> None:
    sentences = set(fact_sentences(42))
    instructions = {r["instruction"] for task in TASKS for side in records(raw, task) for r in side}
    assert not any(line in sentences for text in instructions for line in text.splitlines())
