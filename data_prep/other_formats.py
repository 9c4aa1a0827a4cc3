"""Data files in other forms than ours: what they are called, and how they become one of ours."""

from __future__ import annotations

import json

_CONVERT = "with datasets: load_dataset({name!r}, data_files=FILE, split='train').to_json('records.jsonl')"
_UNPACK = "unpack it, or pack it with gzip"
_BEGINNINGS = (
    (b"PAR1", "a Parquet file", "make JSON lines of it " + _CONVERT.format(name="parquet")),
    (b"ARROW1", "an Arrow file", "make JSON lines of it " + _CONVERT.format(name="arrow")),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", _UNPACK),
    (b"BZh", "packed with bzip2", _UNPACK),
    (b"\xfd7zXZ\x00", "packed with xz", _UNPACK),
)

LONGEST_BEGINNING = max(len(beginning) for beginning, _, _ in _BEGINNINGS)
"""Bytes of a file's beginning that say what it is."""

DAMAGED = "the packed file is damaged: copy or make it again"


def other_format(beginning: bytes) -> tuple[str, str] | None:
    """What a file with these first bytes is, and what to do about it; None where it may be JSON, plain or gzipped."""
    return next(((name, mend) for sign, name, mend in _BEGINNINGS if beginning.startswith(sign)), None)


def remedy_for(fault: Exception, number: int, first: str, *, array: bool) -> str:
    """What to do about an item that is no JSON.

    Args:
        fault: what the parser or the unpacking raised.
        number: the item's, from 1.
        first: the file's first character that is no white space.
        array: whether the file is one array.
    """
    if not isinstance(fault, (ValueError, RecursionError)):
        return DAMAGED
    if number == 1 and first not in "[{":
        return "records are an array or one object a line; make that of a CSV file " + _CONVERT.format(
            name="csv"
        )
    if not array and isinstance(fault, json.JSONDecodeError) and not fault.doc[fault.pos :].strip():
        return "each record stands on one line, or all in one array"
    return "correct or remove it"
