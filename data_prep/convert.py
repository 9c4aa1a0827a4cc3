"""Raw rows to the exact bytes of the published files, section by section."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_prep.published.order import SEPARATOR
from data_prep.records import Record
from data_prep.sources import MissingSplitError, Source
from data_prep.tasks import Split, Task
from flexlora_ds.errors import UserError


@dataclass(frozen=True)
class Section:
    """The records of one raw split, as they are written between the brackets of a file."""

    body: bytes
    records: int
    origin: dict[str, Any]  # for the manifest: source, revision, ..., rows read


@dataclass(frozen=True)
class Limits:
    """At most `limit` records per file: the first ones or, with a seed, random ones in their own order."""

    limit: int | None = None
    seed: int | None = None


def encode(record: Record) -> str:
    """One record exactly as `json.dumps(records, indent=4)` writes it inside the array."""
    fields = ",\n".join(f"        {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return f"    {{\n{fields}\n    }}"


def read_sections(
    task: Task, splits: tuple[Split, ...], source: Source, limits: Limits, strict: bool
) -> tuple[list[Section], list[str]]:
    """Convert the splits of one file, in their natural order; the second result names the missing ones.

    Raises UserError naming file and row of the first one that cannot be converted, an empty split, or, if
    `strict`, a missing one.
    """
    parts: list[tuple[list[str], dict[str, Any]]] = []
    missing: list[str] = []
    room = limits.limit if limits.seed is None else None
    for split in splits:
        if room == 0:
            break
        try:
            texts, origin = _read(task, split, source, room)
        except MissingSplitError as error:
            if strict:
                raise
            missing.append(str(error))
            continue
        parts.append((texts, {**origin, "rows": len(texts)}))
        room = None if room is None else room - len(texts)
    if limits.limit is not None and limits.seed is not None:
        parts = _sample(parts, limits.limit, f"{limits.seed}/{task.name}/{splits[0].file}")
    sections = [
        Section(SEPARATOR.join(t.encode("ascii") for t in texts), len(texts), o)
        for texts, o in parts
        if texts
    ]
    return sections, missing


def _read(task: Task, split: Split, source: Source, limit: int | None) -> tuple[list[str], dict[str, Any]]:
    opened = source.open(task, split)
    texts: list[str] = []
    for number, row in enumerate(islice(opened.rows, limit), 1):
        try:
            texts.append(encode(task.record(row)))
        except UserError as error:
            raise error.at(f"{opened.place}, row {number}") from None
    if not texts:
        raise UserError(
            "the split is empty", opened.place, "fetch it again, or leave its task out with --tasks"
        )
    return texts, opened.origin


def _sample(
    parts: list[tuple[list[str], dict[str, Any]]], limit: int, seed: str
) -> list[tuple[list[str], dict[str, Any]]]:
    total = sum(len(texts) for texts, _ in parts)
    kept = set(random.Random(seed).sample(range(total), min(limit, total)))
    sampled, start = [], 0
    for texts, origin in parts:
        sampled.append(([text for i, text in enumerate(texts, start) if i in kept], origin))
        start += len(texts)
    return sampled
