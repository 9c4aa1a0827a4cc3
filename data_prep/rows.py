"""Reading the columns of a raw benchmark row; every fault names the column (the caller adds file and row)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.messages import require_text
from flexlora_ds.errors import UserError

Row = Mapping[str, Any]


def column(row: Row, name: str) -> Any:
    """The value of a column. Raises UserError where it is missing."""
    try:
        return row[name]
    except KeyError:
        have = ", ".join(row) or "none"
        raise UserError(f"column {name!r} is missing", mend=f"the row's columns are: {have}") from None


def text(row: Row, name: str) -> str:
    """A string column, untouched. Raises UserError where it is missing, no string, or holds a lone surrogate."""
    value = column(row, name)
    if not isinstance(value, str):
        raise UserError(f"column {name!r} is {type(value).__name__}, not a string")
    return require_text(value, f"column {name}")


def truth(row: Row, name: str) -> bool:
    """A boolean column. Raises UserError where it is missing or not true/false."""
    value = column(row, name)
    if not isinstance(value, bool):
        raise UserError(f"column {name!r} is {value!r}, not true or false")
    return value


def number(row: Row, name: str, first: int, last: int) -> int:
    """A label column that holds first..last as an integer or as its decimal string (both occur on the hub).

    Raises UserError where it is missing, no number or out of range.
    """
    value = column(row, name)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not first <= value <= last:
        fault = f"label {row[name]!r} in column {name!r} is out of range"
        raise UserError(fault, mend=f"expected {first} to {last}")
    return value


def texts(row: Row, name: str, count: int) -> list[str]:
    """A column with a list of exactly `count` strings. Raises UserError otherwise."""
    value = column(row, name)
    fits = isinstance(value, (list, tuple)) and len(value) == count
    if not fits or not all(isinstance(item, str) for item in value):
        raise UserError(f"column {name!r} does not hold a list of {count} strings")
    return [require_text(item, f"column {name}") for item in value]


def keyed_choices(row: Row) -> tuple[list[str], int]:
    """The choice texts of an ARC-like row and the position (from 0) of `answerKey` among the choice labels.

    Labels are whatever the row has (A…E, 1…4). Raises UserError where a column is missing or the key is no
    label.
    """
    choices, key = column(row, "choices"), text(row, "answerKey")
    if isinstance(choices, list):  # a list of {text, label} is the same data in another spelling
        choices = {name: [column(choice, name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, Mapping):
        raise UserError("column 'choices' is neither a table nor a list of choices")
    labels = [str(label) for label in column(choices, "label")]
    options = texts(choices, "text", len(labels))
    if key not in labels:
        raise UserError(f"answer key {key!r} is not among the labels {', '.join(labels) or '(none)'}")
    return options, labels.index(key)
