"""Reading records: JSON arrays and JSON lines, plain or gzipped, faults named by file and number."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias, TypedDict, cast

from flexlora_ds.errors import UserError

_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError, zlib.error, RecursionError)

_CHAT_FORM = 'a chat record is {"messages": [{"role": ..., "content": ...}, ...]}'


class Record(TypedDict):
    """One instruction example. `input` may be empty; `answer` is what evaluation compares with."""

    instruction: str
    input: str
    output: str
    answer: str


class Message(TypedDict):
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


class ChatRecord(TypedDict):
    """One chat example. The assistant's turns are what is learnt; the last turn is one of them.

    `answer` is what evaluation compares with; it may be empty in training data.
    """

    messages: list[Message]
    answer: str


Entry: TypeAlias = "Record | ChatRecord"
"""What a line of a data file may be. All of one file are of the same kind."""


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text stream of a plain or gzipped file (recognised by its first bytes, not by its name).

    Raises UserError where the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if packed:
            return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig"))
        return path.open(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", str(path), "run python -m data_prep or correct the path") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from None


def iter_objects(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of every item of a JSON array or of a JSON-lines file; numbers start at 1.

    Holds one chunk in memory. Raises UserError naming file and record number where the text is not JSON,
    not UTF-8 or damaged.
    """
    path = Path(path)
    number = 0
    with open_text(path) as file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            items = _array_items(file) if first == "[" else _line_items(file, first)
            for number, item in enumerate(items, 1):
                yield number, item
        except _UNREADABLE as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            place = f"{path}, record {number + 1}"
            raise UserError(f"not valid JSON: {fault}", place, "correct or remove it") from None


def _line_items(file: IO[str], first: str) -> Iterator[Any]:
    head = first + file.readline() if first else ""
    return (json.loads(line) for line in chain([head], file) if line.strip())


def _array_items(file: IO[str]) -> Iterator[Any]:
    """Items of an array whose opening bracket has been read."""
    text, at, separator = "", 0, ""
    while True:
        at = _end_of_space(text, at)
        if at == len(text):
            text, at = file.read(_CHUNK), 0
            if not text:
                raise json.JSONDecodeError("the array is not closed", "", 0)
        elif text[at] == "]" and separator != ",":
            if text[at + 1 :].strip() or file.read().strip():
                raise json.JSONDecodeError("text after the array's end", "", 0)
            return
        elif separator == "wanted":
            if text[at] != ",":
                raise json.JSONDecodeError("',' or ']' expected after the record before", "", 0)
            at, separator = at + 1, ","
        else:
            item, text, at = _decode(file, text, at)
            separator = "wanted"
            yield item


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _decode(file: IO[str], text: str, at: int) -> tuple[Any, str, int]:
    """One value that starts at `text[at]`, reading on while it is incomplete; with it, the text and its end."""
    while True:
        fault: json.JSONDecodeError | None = None
        item, end = None, at
        try:
            item, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            fault = error
        if fault is None and end < len(text):  # at the very end, a number could go on in the next chunk
            return item, text, end
        more = file.read(max(_CHUNK, len(text)))
        if not more:
            if fault is not None:
                raise fault
            return item, text, end
        text, at = text[at:] + more, 0


def _text_field(value: dict[str, Any], key: str, place: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise UserError(f"{key!r} is {type(text).__name__}, not a string", place)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key!r} holds a lone surrogate, which is no text", place) from None
    return text


def to_record(value: Any, place: str, need_answer: bool = False) -> Record:
    """Check one parsed object. `place` goes into the UserError that names the first fault."""
    needed = ("instruction", "output", "answer") if need_answer else ("instruction", "output")
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__} where a record (an object) is expected", place)
    missing = [key for key in needed if key not in value]
    if missing:
        remedy = "records need instruction, input, output, answer"
        if "messages" in value:
            remedy = "this is a chat record, and chats do not mix with records in one file: see docs/data.md"
        raise UserError(f"{missing[0]!r} is missing", place, remedy)
    record: Record = {
        "instruction": _text_field(value, "instruction", place),
        "input": _text_field(value, "input", place) if value.get("input") is not None else "",
        "output": sys.intern(_text_field(value, "output", place)),
        "answer": sys.intern(_text_field(value, "answer", place)) if value.get("answer") is not None else "",
    }
    for key in needed:
        if not record[key].strip():  # type: ignore[literal-required]
            raise UserError(f"{key!r} is empty", place)
    return record


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


def to_chat(value: Any, place: str, need_answer: bool = False) -> ChatRecord:
    """Check one parsed chat object: roles known, contents strings, the last turn the assistant's."""
    turns = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError("'messages' is missing or empty", place, _CHAT_FORM)
    messages = [_to_message(turn, f"{place}, message {number}") for number, turn in enumerate(turns, 1)]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError("the last message is not an assistant's answer: nothing to learn", place)
    answer = _text_field(value, "answer", place) if value.get("answer") is not None else ""
    if need_answer and not answer.strip():
        raise UserError("'answer' is missing or empty", place, "evaluation compares with it")
    return {"messages": messages, "answer": answer}


def _to_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError("a message needs 'role' and 'content'", place)
    role = _text_field(turn, "role", place)
    if role not in ("system", "user", "assistant"):
        raise UserError(f"unknown role {role!r}", place, "use system, user or assistant")
    return {"role": role, "content": _text_field(turn, "content", place)}


def load_entries(path: str | Path, need_answer: bool = False) -> list[Entry]:
    """All records or all chats of a file, whichever its first one is: what training and evaluation read.

    Raises UserError naming file and number of the first malformed one (of another kind than the first included), or
    an empty file.
    """
    entries: list[Entry] = []
    check: Callable[[Any, str, bool], Entry] = to_record
    for number, value in iter_objects(path):
        if number == 1 and _is_chat(value):
            check = to_chat
        entries.append(check(value, f"{path}, record {number}", need_answer))
    if not entries:
        raise UserError("holds no records", str(path))
    return entries


def is_chat(path: str | Path) -> bool:
    """Whether a file's first record is a chat record. Raises UserError where the file cannot be read."""
    return _is_chat(next((value for _, value in iter_objects(path)), None))


def _is_chat(value: Any) -> bool:
    return isinstance(value, dict) and "messages" in value and "instruction" not in value
