"""The templates against records written out by hand, quirks included, and what a bad row gets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data_prep.published.files import CORPUS, PUBLISHED
from data_prep.tasks import TASKS
from flexlora_ds.errors import UserError
from tests.helpers.raw_rows import ROWS, winogrande

TRUE_FALSE = "Please answer the following question with true or false, question: "
CHOOSE = "Please choose the correct answer to the question: "
EXPECTED: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "boolq",
        ROWS["boolq"][0],
        f"{TRUE_FALSE}is ice colder than\u200b steam?\n\nAnswer format: true/false",
        "true",
    ),
    (
        "boolq",
        {"question": "is this one?", "answer": False},  # a question mark of its own: another is appended
        f"{TRUE_FALSE}is this one??\n\nAnswer format: true/false",
        "false",
    ),
    (
        "piqa",
        ROWS["piqa"][0],
        "Please choose the correct solution to the question: Dry a  cup \n\nSolution1: use a towel \n\n"
        "Solution2: use  a lake\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    (
        "social_i_qa",
        ROWS["social_i_qa"][2],
        f"{CHOOSE}Jo won. How is Jo?\n\nAnswer1: sad Answer2: lost Answer3: glad\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        "hellaswag",
        ROWS["hellaswag"][0],
        "Please choose the correct ending to complete the given sentence: "
        "Baking: [header] How to bake [title] Mix. she"
        '\n\nEnding1: eats "it". Ending2: , stirs. Ending3: sleeps Ending4: runs away\n'
        "\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    (
        "winogrande",
        winogrande("xs")[0],
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The cat sat on the mat as the _ was warm.\n\nOption1: cat Option2: mat "
        "Answer format: option1/option2",
        "option2",
    ),
    (
        "ARC-Easy",
        ROWS["ARC-Easy"][0],
        f"{CHOOSE}Which is hot?\n\nAnswer1: ice Answer2: fire Answer3: snow\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    (
        "ARC-Easy",
        ROWS["ARC-Easy"][1],
        f"{CHOOSE}At 5°, what?\n\nAnswer1: i Answer2: j Answer3: k Answer4: l\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
    (
        "ARC-Challenge",
        ROWS["ARC-Challenge"][0],
        f"{CHOOSE}Pick\n\nAnswer1: a Answer2: b Answer3: c Answer4: d Answer5: e\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    (
        "openbookqa",
        ROWS["openbookqa"][0],
        f"{CHOOSE}The sun is\n\nAnswer1: a star Answer2: a fish Answer3: a car Answer4: a hat\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
]


@pytest.mark.parametrize(("task", "row", "instruction", "answer"), EXPECTED)
def test_record(task: str, row: dict[str, Any], instruction: str, answer: str) -> None:
    record = TASKS[task].record(row)
    assert list(record) == ["instruction", "input", "output", "answer"]
    assert record == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    choices = TASKS[task].answers(record)
    assert choices == instruction.rpartition("Answer format: ")[2].split("/") and answer in choices
    assert re.findall(TASKS[task].pattern, record["output"]) == [answer]


def test_an_item_that_mentions_the_answer_format_keeps_its_own_choices() -> None:
    record = TASKS["boolq"].record({"question": "is 'Answer format: a/b' text", "answer": True})
    assert TASKS["boolq"].answers(record) == ["true", "false"]
    record["instruction"] = "no such line"
    with pytest.raises(UserError, match="Answer format"):
        TASKS["boolq"].answers(record)


def test_choices_as_a_list_are_the_same_item() -> None:
    row = ROWS["ARC-Easy"][1]
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    listed = {**row, "choices": [{"text": text, "label": label} for text, label in pairs]}
    assert TASKS["ARC-Easy"].record(listed) == TASKS["ARC-Easy"].record(row)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"sol2": None}, "'sol2' is NoneType"),
        ("piqa", {"sol2": "a \ud800"}, "'column sol2' holds a lone surrogate"),
        ("hellaswag", {"endings": ["a", "\udfff", "b", "c"]}, "'column endings' holds a lone surrogate"),
        (
            "ARC-Easy",
            {"choices": {"text": ["\ud800"], "label": ["C"]}},
            "'column text' holds a lone surrogate",
        ),
        ("piqa", {"label": 2}, "label 2 .*expected 0 to 1"),
        ("piqa", {"label": -1}, "label -1"),
        ("piqa", {"label": True}, "label True"),
        ("social_i_qa", {"label": "0"}, "label '0' .*expected 1 to 3"),
        ("hellaswag", {"label": ""}, "label ''"),
        ("hellaswag", {"endings": ["a", "b"]}, "list of 4 strings"),
        ("boolq", {"answer": "yes"}, "'yes', not true or false"),
        ("ARC-Easy", {"answerKey": "D"}, "'D' is not among the labels A, B, C"),
        ("ARC-Easy", {"choices": {"text": ["x"], "label": ["A", "B"]}}, "list of 2 strings"),
        ("ARC-Easy", {"choices": "x"}, "'choices'"),
    ],
)
def test_a_bad_row_is_explained(task: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TASKS[task].record({**ROWS[task][0], **change})


@pytest.mark.parametrize("task", [name for name in TASKS if name != "winogrande"])
def test_every_column_of_a_template_is_needed(task: str) -> None:
    row = ROWS[task][0]
    unused = {"passage", "id", "ind", "ctx_a", "ctx_b"}
    for name in row.keys() - unused:
        with pytest.raises(UserError, match=f"'{name}' is missing; the row's columns are"):
            TASKS[task].record({key: value for key, value in row.items() if key != name})


def test_the_published_table_fits_together() -> None:
    train = [value for name, value in PUBLISHED.items() if name.endswith("train.json")]
    assert len(PUBLISHED) == 17 and len(train) == sum(task.in_corpus for task in TASKS.values()) == 8
    assert sum(value.records for value in train) == PUBLISHED[CORPUS].records
    # eight arrays become one: 7 separators of 2 bytes for 7 pairs of brackets of 4
    assert sum(value.bytes for value in train) - 7 * 4 + 7 * 2 == PUBLISHED[CORPUS].bytes
