"""A built file against the published one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.json_items import iter_objects
from data_prep.published.files import Published


class Verdict(NamedTuple):
    """`kind`: identical, differs, partial (fewer records than published), unpublished; `detail`: why."""

    kind: str
    detail: str = ""


def judge(records: int, size: int, sha256: str, published: Published | None) -> Verdict:
    """Compare counts, bytes and hash; the published file itself is not needed."""
    if published is None:
        return Verdict("unpublished", "no published file to compare with")
    if sha256 == published.sha256:
        return Verdict("identical")
    if records < published.records:
        return Verdict("partial", f"{records:,} of {published.records:,} records")
    if records > published.records:
        return Verdict("differs", f"{_counted(records - published.records, 'record')} more than published")
    gap = size - published.bytes
    if gap == 0:
        return Verdict(
            "differs", "as many records and bytes, another hash: order or single characters differ"
        )
    return Verdict(
        "differs", f"as many records, {_counted(abs(gap), 'byte')} {'more' if gap > 0 else 'fewer'}"
    )


def first_differences(built: Path, published: Path) -> str:
    """Compare two files record by record: how many differ, and where and how the first one does.

    Raises UserError where either file cannot be read.
    """
    count, first = 0, ""
    for number, (ours, theirs) in enumerate(zip_longest(_values(built), _values(published)), 1):
        if ours != theirs:
            count += 1
            first = first or f"record {number}: {_difference(ours, theirs)}"
    if not count:
        return "the same records, written differently"
    return f"{_counted(count, 'record')} differ{'s' if count == 1 else ''}; the first: {first}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _values(path: Path) -> Iterator[Any]:
    return (value for _, value in iter_objects(path))


def _difference(ours: Any, theirs: Any) -> str:
    if ours is None or theirs is None:
        return "only in the published file" if ours is None else "not in the published file"
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return f"built {_excerpt(str(ours), 0)}, published {_excerpt(str(theirs), 0)}"
    for key in {**ours, **theirs}:
        mine, other = str(ours.get(key)), str(theirs.get(key))
        if mine != other:
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
                min(len(mine), len(other)),
            )
            return f"{key!r} at character {at}: built {_excerpt(mine, at)}, published {_excerpt(other, at)}"
    return "the order of the keys"


def _excerpt(text: str, at: int) -> str:
    return ascii(text[max(0, at - 10) : at + 30])
