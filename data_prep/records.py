"""Records and chats: what a data file may hold, checked; faults named by file and number."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from data_prep.json_items import iter_objects
from data_prep.messages import ChatRecord, chat_key, optional_text, require_text, text_field, to_chat
from data_prep.record_keys import (
    UnreadKeys,
    is_given,
    refuse_bad_answer,
    refuse_changed_meaning,
    require_learnt,
)
from flexlora_ds.errors import UserError


class _Before(TypedDict, total=False):
    system: str
    history: list[tuple[str, str]]


class Record(_Before):
    """One instruction example. `input` may be empty; `answer` is what evaluation compares with.

    Only where the file has them: `system`, what the assistant is told first, and `history`, earlier questions with
    their answers. Both are context.
    """

    instruction: str
    input: str
    output: str
    answer: str


Entry: TypeAlias = "Record | ChatRecord"
"""What a line of a data file may be. All of one file are of the same kind."""


def to_record(value: Any, place: str, need_answer: bool = False) -> Record:
    """Check one parsed object.

    Raises:
        UserError: names the first fault, or a key that changes what the record means, and `place`.
    """
    needed = ("instruction", "output", "answer") if need_answer else ("instruction", "output")
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__} where a record (an object) is expected", place)
    refuse_changed_meaning(value, place)
    if not need_answer:
        refuse_bad_answer(value, place)
    missing = [key for key in needed if key not in value]
    if missing:
        raise UserError(f"{missing[0]!r} is missing", place, _remedy_for(value))
    if not need_answer:  # evaluation learns nothing
        require_learnt(value, place)
    if value.get(chat_key(value) or ""):
        raise UserError(f"{chat_key(value)!r} stands beside 'instruction'", place, "keep one of them")
    record: Record = {
        "instruction": text_field(value, "instruction", place),
        "input": optional_text(value, "input", place),
        "output": sys.intern(text_field(value, "output", place)),
        "answer": sys.intern(optional_text(value, "answer", place)),
    }
    for key in needed:
        if not record[key].strip():  # type: ignore[literal-required]
            raise UserError(f"{key!r} is empty", place)
    if is_given(value.get("system")):
        record["system"] = text_field(value, "system", place)
    if is_given(value.get("history")):
        record["history"] = _history(value["history"], place)
    return record


def _remedy_for(value: dict[str, Any]) -> str:
    if _is_chat(value):
        return "this is a chat record, and chats do not mix with records in one file: see docs/data.md"
    if "completion" in value or "question" in value:
        asked = "prompt" if "prompt" in value else "question"
        answered = "completion" if "completion" in value else "answer"
        return f"rename {asked!r} to 'instruction' and {answered!r} to 'output', or write chats of messages"
    return "records need instruction, input, output, answer"


def _history(pairs: Any, place: str) -> list[tuple[str, str]]:
    """Earlier questions with their answers."""
    if not isinstance(pairs, list):
        raise UserError(f"'history' is {type(pairs).__name__}, not a list of pairs", place)
    history = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError("'history' holds something else than [question, answer]", place)
        history.append((require_text(pair[0], "history", place), require_text(pair[1], "history", place)))
    return history


def iter_records(path: str | Path, need_answer: bool = False) -> Iterator[Record]:
    """Yield the records of a JSON, JSONL or gzipped file in order; memory stays at one chunk.

    `input` and (unless `need_answer`) `answer` may be absent and are then empty; other keys are ignored.
    Raises UserError naming file and number of the first malformed record.
    """
    for number, value in iter_objects(path):
        yield to_record(value, f"{path}, record {number}", need_answer)


def load_records(path: str | Path, need_answer: bool = False) -> list[Record]:
    """All records of a file, in order; like `iter_records`, and a file without any is a UserError."""
    records = list(iter_records(path, need_answer))
    if not records:
        raise UserError("holds no records", str(path))
    return records


def load_entries(
    path: str | Path, need_answer: bool = False, note: Callable[[str], None] = lambda line: None
) -> list[Entry]:
    """All records or all chats of a file, whichever its first one is: what training and evaluation read.

    `note` gets a line that names the keys which nothing reads, where there are such.

    Raises:
        UserError: names file and number of the first malformed one (of another kind than the first included), or an
            empty file.
    """
    entries: list[Entry] = []
    unread = UnreadKeys()
    check: Callable[[Any, str, bool], Entry] = to_record
    for number, value in iter_objects(path):
        if number == 1 and _is_chat(value):
            check = to_chat
        entries.append(check(value, f"{path}, record {number}", need_answer))
        unread.add(value, number)
    if not entries:
        raise UserError("holds no records", str(path))
    said = unread.note(path)
    if said:
        note(said)
    return entries


def is_chat(path: str | Path) -> bool:
    """Whether a file's first record is a chat record. Raises UserError where the file cannot be read."""
    return _is_chat(next((value for _, value in iter_objects(path)), None))


def _is_chat(value: Any) -> bool:
    """Whether it has messages, and no whole record beside them."""
    return chat_key(value) is not None and any(value.get(key) is None for key in ("instruction", "output"))
