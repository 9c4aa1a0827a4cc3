"""The files that a build writes, by their plain definition, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.published.files import CORPUS
from data_prep.tasks import TASKS
from tests.helpers.raw_rows import ROWS, WINOGRANDE_PARTS, winogrande

FILES = [*(f"{task}/{kind}.json" for task in TASKS for kind in ("train", "test")), CORPUS]


def expected(parts: tuple[str, ...] = WINOGRANDE_PARTS) -> dict[str, str]:
    """The files' texts by the plain definition: `json.dumps(records, indent=4)` of all rows in order."""
    texts, corpus = {}, []
    for task in TASKS.values():
        train = (
            [row for part in parts for row in winogrande(part)]
            if task.name == "winogrande"
            else ROWS[task.name]
        )
        test = winogrande("validation") if task.name == "winogrande" else ROWS[task.name]
        corpus += [task.record(row) for row in train]
        texts[f"{task.name}/train.json"] = json.dumps([task.record(row) for row in train], indent=4)
        texts[f"{task.name}/test.json"] = json.dumps([task.record(row) for row in test], indent=4)
    return {**texts, CORPUS: json.dumps(corpus, indent=4)}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
