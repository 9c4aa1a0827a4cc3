"""Reading answers: every quirk of the published parsing, against the published expression."""

from __future__ import annotations

import re

import pytest

from data_prep.tasks import TASKS
from eval.parsing import read_answer


@pytest.mark.parametrize(
    ("task", "output", "expected"),
    [
        ("ARC-Easy", "the correct answer is answer2", "answer2"),
        ("ARC-Easy", "answer3 or answer1", "answer3"),  # several: the first
        ("ARC-Easy", "Answer2", None),  # capitals count
        ("ARC-Easy", "ANSWER2, that is answer4", "answer4"),
        ("ARC-Easy", "the second one", None),
        ("ARC-Easy", "", None),
        ("ARC-Easy", "answer5", "answer5"),  # also where the item has three
        ("ARC-Easy", "answer6", None),
        ("ARC-Easy", "answer12", "answer1"),  # parts of words count
        ("ARC-Easy", "answer 1", None),
        ("social_i_qa", "answer5", "answer5"),
        ("openbookqa", "answer1answer2", "answer1"),
        ("boolq", "untrue, so false", "true"),
        ("boolq", "True", None),
        ("boolq", "falsetrue", "false"),
        ("piqa", "solution3 solution2", "solution2"),
        ("hellaswag", "ending5 ending4", "ending4"),
        ("winogrande", "\n option2</s>", "option2"),
        ("winogrande", "answer1", None),
    ],
)
def test_first_match_is_the_answer(task: str, output: str, expected: str | None) -> None:
    assert read_answer(TASKS[task].pattern, output) == expected
    published = re.findall(TASKS[task].pattern, output.strip())
    assert (published[0] if published else None) == expected


def test_only_what_follows_the_last_response_mark_is_read() -> None:
    whole = "### Instruction:\nanswer1/answer2\n\n### Response:\nanswer3\n\n### Response:\nanswer2"
    assert read_answer(TASKS["ARC-Easy"].pattern, whole) == "answer2"
    assert read_answer(TASKS["ARC-Easy"].pattern, whole + "\n### Response:\n") is None
