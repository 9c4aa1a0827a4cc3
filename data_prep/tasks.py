"""The eight tasks of Commonsense170K: where each comes from, its columns, its answers, its template.

Each template reproduces LLM-Adapters' published files byte for byte: text is never stripped, normalised or
deduplicated. Raise a task's `version` whenever its records change; docs/data.md shows how to add a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.records import Record
from data_prep.rows import Row, keyed_choices, number, text, texts, truth
from flexlora_ds.errors import UserError

_ANSWER_FORMAT = "Answer format: "


@dataclass(frozen=True)
class Split:
    """One raw split: its name in a local folder (`<task>/<file>.jsonl`) and its name on the hub.

    `config` is the hub configuration, where it differs from that of the place.
    """

    file: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class HubPlace:
    """A data set on the hub. `adapt` turns its rows into the task's columns where they differ."""

    path: str
    config: str | None = None
    revision: str | None = None
    adapt: Callable[[Row], Row] | None = None

    def __str__(self) -> str:
        return self.path + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Task:
    """One benchmark.

    `convert` maps a raw row to (instruction, answer). `pattern` is the published answer regex, searched
    case-sensitively in the generated text. `train` lists the raw splits of the training file in their natural
    order. `hub` lists places to load from, the first that works is used. `in_corpus`: whether the task is
    part of commonsense_170k.json.
    """

    name: str
    convert: Callable[[Row], tuple[str, str]]
    pattern: str
    hub: tuple[HubPlace, ...]
    test: Split
    train: tuple[Split, ...] = (Split("train", "train"),)
    version: int = 1
    in_corpus: bool = True

    def record(self, row: Row) -> Record:
        """The record of a raw row. Raises UserError naming the column that is missing or out of range."""
        instruction, answer = self.convert(row)
        return {
            "instruction": instruction,
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }

    def answers(self, record: Record) -> list[str]:
        """The item's own choices in order, read from its `Answer format:` line.

        Raises UserError where the instruction has no such line.
        """
        _, mark, choices = record["instruction"].rpartition(_ANSWER_FORMAT)
        if not mark or not choices:
            raise UserError(
                f"a {self.name} record without an 'Answer format: a/b' line",
                mend="end its instruction with that line",
            )
        return choices.split("/")


def _boolq(row: Row) -> tuple[str, str]:
    instruction = (
        f"Please answer the following question with true or false, question: {text(row, 'question')}?"
        "\n\nAnswer format: true/false"
    )
    return instruction, "true" if truth(row, "answer") else "false"


def _piqa(row: Row) -> tuple[str, str]:
    instruction = (
        f"Please choose the correct solution to the question: {text(row, 'goal')}"
        f"\n\nSolution1: {text(row, 'sol1')}\n\nSolution2: {text(row, 'sol2')}"
        "\n\nAnswer format: solution1/solution2"
    )
    return instruction, f"solution{number(row, 'label', 0, 1) + 1}"


def _social_i_qa(row: Row) -> tuple[str, str]:
    instruction = (
        f"Please choose the correct answer to the question: {text(row, 'context')} {text(row, 'question')}"
        f"\n\nAnswer1: {text(row, 'answerA')} Answer2: {text(row, 'answerB')} Answer3: {text(row, 'answerC')}"
        "\n\nAnswer format: answer1/answer2/answer3"
    )
    return instruction, f"answer{number(row, 'label', 1, 3)}"


def _hellaswag(row: Row) -> tuple[str, str]:
    endings = " ".join(f"Ending{i}: {ending}" for i, ending in enumerate(texts(row, "endings", 4), 1))
    instruction = (
        "Please choose the correct ending to complete the given sentence: "
        f"{text(row, 'activity_label')}: {text(row, 'ctx')}\n\n{endings}"
        "\n\nAnswer format: ending1/ending2/ending3/ending4"
    )
    return instruction, f"ending{number(row, 'label', 0, 3) + 1}"


def _winogrande(row: Row) -> tuple[str, str]:
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{text(row, 'sentence')}\n\nOption1: {text(row, 'option1')} Option2: {text(row, 'option2')} "
        "Answer format: option1/option2"
    )
    return instruction, f"option{number(row, 'answer', 1, 2)}"


def _multiple_choice(stem: str, row: Row) -> tuple[str, str]:
    options, right = keyed_choices(row)
    numbers = range(1, len(options) + 1)
    listed = " ".join(f"Answer{i}: {option}" for i, option in zip(numbers, options, strict=True))
    instruction = (
        f"Please choose the correct answer to the question: {stem}\n\n{listed}"
        f"\n\nAnswer format: {'/'.join(f'answer{i}' for i in numbers)}"
    )
    return instruction, f"answer{right + 1}"


def _arc(row: Row) -> tuple[str, str]:
    return _multiple_choice(text(row, "question"), row)


def _openbookqa(row: Row) -> tuple[str, str]:
    return _multiple_choice(text(row, "question_stem"), row)


def _from_super_glue(row: Row) -> Row:
    return {**row, "answer": bool(number(row, "label", 0, 1))}


_FIVE_ANSWERS = "answer1|answer2|answer3|answer4|answer5"  # whatever the item has
_WINOGRANDE_PARTS = ("xs", "s", "m", "l", "xl", "debiased")
_VALIDATION, _TEST = Split("validation", "validation"), Split("test", "test")

_DEFINITIONS = (
    Task(
        "boolq",
        _boolq,
        "true|false",
        hub=(HubPlace("google/boolq"), HubPlace("aps/super_glue", "boolq", adapt=_from_super_glue)),
        test=_VALIDATION,
    ),
    Task(
        "piqa",
        _piqa,
        "solution1|solution2",
        hub=(HubPlace("ybisk/piqa", revision="refs/convert/parquet"), HubPlace("baber/piqa")),
        test=_VALIDATION,
    ),
    Task(
        "social_i_qa",
        _social_i_qa,
        _FIVE_ANSWERS,
        hub=(HubPlace("lighteval/siqa"), HubPlace("allenai/social_i_qa", revision="refs/convert/parquet")),
        test=_VALIDATION,
    ),
    Task(
        "hellaswag",
        _hellaswag,
        "ending1|ending2|ending3|ending4",
        hub=(HubPlace("Rowan/hellaswag"), HubPlace("Rowan/hellaswag", revision="refs/convert/parquet")),
        test=_VALIDATION,
    ),
    Task(
        "winogrande",
        _winogrande,
        "option1|option2",
        hub=(HubPlace("allenai/winogrande"), HubPlace("allenai/winogrande", revision="refs/convert/parquet")),
        train=tuple(Split(f"train_{part}", "train", f"winogrande_{part}") for part in _WINOGRANDE_PARTS),
        test=Split("validation", "validation", "winogrande_xs"),
    ),
    Task(
        "ARC-Easy",
        _arc,
        _FIVE_ANSWERS,
        hub=(
            HubPlace("allenai/ai2_arc", "ARC-Easy"),
            HubPlace("allenai/ai2_arc", "ARC-Easy", revision="refs/convert/parquet"),
        ),
        test=_TEST,
    ),
    Task(
        "ARC-Challenge",
        _arc,
        _FIVE_ANSWERS,
        hub=(
            HubPlace("allenai/ai2_arc", "ARC-Challenge"),
            HubPlace("allenai/ai2_arc", "ARC-Challenge", revision="refs/convert/parquet"),
        ),
        test=_TEST,
    ),
    Task(
        "openbookqa",
        _openbookqa,
        _FIVE_ANSWERS,
        hub=(
            HubPlace("allenai/openbookqa", "main"),
            HubPlace("allenai/openbookqa", "main", revision="refs/convert/parquet"),
        ),
        test=_TEST,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _DEFINITIONS}
