"""The test sets of an evaluation: questions as they are asked, and as a tokenizer reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.prompt import CHAT
from data_prep.tasks import TASKS
from eval.items import Question, TaskItems, load_questions, tokenise
from eval.parsing import read_answer
from eval.protocols import Protocol, protocol_of
from flexlora_ds.errors import UserError


def load_all_questions(
    data: Path,
    tasks: Sequence[str],
    limit: int | None,
    style: str,
    note: Callable[[str], None],
    places: tuple[str, str] = ("--data", "--tasks"),
) -> dict[str, list[Question]]:
    """The first `limit` questions of each task; `note` as of `load_questions`.

    Args:
        places: what the options for `data` and `tasks` are called.

    Raises:
        UserError: a task has no file, or a malformed record.
    """
    missing = [task for task in tasks if not (data / task / "test.json").is_file()]
    if missing:
        there = [task for task in tasks if task not in missing]
        remedy = f"build it with python -m data_prep --out {data}"
        if there:
            remedy += f", or choose {places[1]} {','.join(there)}"
        raise UserError(f"no test.json for {', '.join(missing)}", f"{places[0]} {data}", remedy)
    return {task: load_questions(data, task, style, limit, note) for task in tasks}


def protocol_for(mode: str, questions: Mapping[str, Sequence[Question]], style: str) -> tuple[Protocol, str]:
    """The protocol in the version that these questions need, and their prompt style: that of chats, where all are.

    Raises:
        UserError: the protocol generates, and a question has a choice that could not be read from a text.
    """
    chats = [question.chat for found in questions.values() for question in found]
    protocol = protocol_of(mode, chats=any(chats))
    if protocol.generates:
        for found in questions.values():
            for question in found:
                _require_readable(question)
    return protocol, CHAT if all(chats) else style


def _require_readable(question: Question) -> None:
    """Raise UserError where one of the choices is read as another one or as none: it would count as wrong, or right."""
    pattern = TASKS[question.task].pattern
    for choice in question.answers:
        read = read_answer(pattern, choice)
        if read != choice:
            raise UserError(
                f"an answer {choice!r} would be read as {'none' if read is None else repr(read)} by the pattern of "
                f"{question.task}, {pattern}",
                f"{question.task}/test.json, record {question.index + 1}",
                "ask by score, or name the choices as the pattern does",
            )


def tokenise_all(
    questions: Mapping[str, Sequence[Question]], tokenizer: Any, day: str | None
) -> dict[str, TaskItems]:
    """Each task's items as `tokenise` makes them. Raises UserError."""
    return {task: tokenise(task, found, tokenizer, day) for task, found in questions.items()}
