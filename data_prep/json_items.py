"""Reading JSON arrays and JSON lines, plain or gzipped, item by item: bounded memory, faults named by item number."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from data_prep.other_formats import LONGEST_BEGINNING, other_format, remedy_for
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import JSON_FAULTS, json_fault, open_ordinary

LONGEST_ITEM = 4 << 20
"""Characters of an item's JSON at most: a tokenizer takes some 160 bytes of memory for each."""

_CHUNK = 1 << 20  # characters
_GIB = 1 << 30
_MOST_EXPANSION = (
    200  # generated text shrinks to a hundredth; deflate's limit, which a bomb comes near, is 1,032
)
_NOT_FOUND = "run python -m data_prep or correct the path"
_SPACE = re.compile(r"[ \t\r\n]*")
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8
_TAIL = 16  # characters: the longest thing but a string that a chunk's end can divide is -Infinity
_UNREADABLE = (*JSON_FAULTS, EOFError, OSError, zlib.error)


def open_text(path: Path) -> IO[str]:
    """A text stream of a plain or gzipped file (recognised by its first bytes, not by its name).

    A byte that is not UTF-8 comes as a lone surrogate (`surrogateescape`), so that the reader can say where it is.

    Raises:
        UserError: the file is missing, cannot be read, is not an ordinary file, or one of another format.
    """
    file = open_ordinary(path, _NOT_FOUND)
    beginning = file.read(LONGEST_BEGINNING)
    other = other_format(beginning)
    if other is not None:
        file.close()
        raise UserError(f"{other[0]}, not JSON", str(path), other[1])
    packed = beginning.startswith(b"\x1f\x8b")
    file.seek(0)
    stream = cast(BinaryIO, _Unpacked(file)) if packed else file
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")


def iter_objects(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of every item of a JSON array or of a JSON-lines file; numbers start at 1.

    Holds one chunk and one item in memory.

    Raises:
        UserError: names file and item number where the text is not JSON, not UTF-8, damaged, too long for one item,
            or gives a key of an object twice.
    """
    path = Path(path)
    number, first = 0, ""
    with open_text(path) as file:
        try:
            first = _first_character(file)
            items = _array_items(file) if first == "[" else _line_items(file, first)
            for number, item in enumerate(items, 1):
                yield number, item
        except UserError as error:
            raise error.at(f"{path}, record {number + 1}") from None
        except _UNREADABLE as error:
            fault = json_fault(error) if isinstance(error, JSON_FAULTS) else str(error)
            place = f"{path}, record {number + 1}"
            mend = remedy_for(error, number + 1, first, array=first == "[")
            raise UserError(f"not valid JSON: {fault}", place, mend) from None


class _Unpacked(gzip.GzipFile):
    """An unpacked gzip file; a small one that unpacks without end is refused."""

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def read1(self, size: int = -1) -> bytes:
        """As GzipFile's, which the text layer calls."""
        data = super().read1(size)
        if self.tell() > max(_GIB, _MOST_EXPANSION * self._packed.tell()):
            raise UserError(
                f"the gzip file unpacks to more than {_MOST_EXPANSION} times its size",
                mend="unpack it, and look at what it holds",
            )
        return data

    def close(self) -> None:
        """Close the packed file too."""
        super().close()
        self._packed.close()


def _first_character(file: IO[str]) -> str:
    for _ in range(_CHUNK):
        first = file.read(1)
        if not first.isspace():
            return first
    raise UserError("begins with a megabyte of white space", mend="remove it")


def _line_items(file: IO[str], first: str) -> Iterator[Any]:
    line = first + file.readline(LONGEST_ITEM)
    while line:
        if line.strip():
            yield _parse_line(line)
        line = file.readline(LONGEST_ITEM + 1)


def _parse_line(line: str) -> Any:
    _require_fitting(len(line))
    _require_utf8(line)
    return json.loads(line, object_pairs_hook=_without_duplicates)


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
            if text[at + 1 :].strip() or any(line.strip() for line in iter(lambda: file.read(_CHUNK), "")):
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"the key {twice!r} stands twice in one object", mend="leave one out")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _decode(file: IO[str], text: str, at: int) -> tuple[Any, str, int]:
    """One value that starts at `text[at]`, reading on while it is incomplete; with it, the text and its end."""
    while True:
        fault: json.JSONDecodeError | None = None
        item, end = None, at
        try:
            item, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            fault = error
        _require_utf8(text, at, end if fault is None else fault.pos + 1)
        _require_fitting((len(text) if fault is not None else end) - at)
        if fault is None and end < len(text):  # at the very end, a number could go on in the next chunk
            return item, text, end
        if fault is not None and not _could_go_on(fault, text):
            raise fault
        more = file.read(max(_CHUNK, len(text)))
        if not more:
            if fault is not None:
                raise fault
            return item, text, end
        text, at = text[at:] + more, 0


def _could_go_on(fault: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could make it JSON: what is wrong is at the end, or a string that does not end."""
    return fault.msg.startswith("Unterminated string") or fault.pos >= len(text) - _TAIL


def _require_fitting(length: int) -> None:
    if length > LONGEST_ITEM:
        raise UserError(f"longer than {LONGEST_ITEM:,} characters", mend="divide it into several records")


def _require_utf8(text: str, start: int = 0, end: int | None = None) -> None:
    """Raise UserError where this part of a text read with `surrogateescape` holds a byte that is not UTF-8."""
    found = None if text.isascii() else _BAD_BYTE.search(text, start, len(text) if end is None else end)
    if found is not None:
        before = text[max(start, found.start() - 20) : found.start()]
        raise UserError(
            f"not UTF-8: byte 0x{ord(found.group()) - 0xDC00:02x} after {before!r}",
            mend="save the file as UTF-8",
        )
