"""Logs that grow, read as far as they have grown: the rows of all of them in the order of the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError
from flexlora_ds.files.reading import JSON_FAULTS, json_fault, open_ordinary
from launch.run_folder.folder import RunFolder
from launch.run_folder.rows import Check, fault_of

_MEND = "restore the file"


@dataclass(frozen=True)
class Entry:
    """A row, and the name of the file that it stands in."""

    log: str
    row: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The step of the row."""
        return int(self.row["step"])


class LogTail:
    """One JSON-lines file from its beginning; a line that is not whole yet is read later."""

    def __init__(self, path: Path, kind: Mapping[str, Check]) -> None:
        self._path, self._kind = path, kind
        self._read = 0

    def new(self) -> list[Entry]:
        """The rows that were written since the last call.

        Raises:
            RunError: a line is no row of this log.
        """
        if not self._path.exists():
            return []
        with open_ordinary(self._path, _MEND) as file:
            file.seek(self._read)
            whole, feed, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(feed)
        return [Entry(self._path.name, self._parsed(line)) for line in whole.split(b"\n") if line]

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line.decode())
            fault = fault_of(row, self._kind)
        except JSON_FAULTS as error:
            row, fault = {}, json_fault(error)
        if fault is not None:
            raise RunError(f"not a row of a run: {fault}", str(self._path), _MEND)
        found: dict[str, Any] = row
        return found


class RunTail:
    """All logs of a run. Within a step the rows come in the order in which a run writes them."""

    def __init__(self, folder: RunFolder) -> None:
        self._steps = LogTail(folder.metrics.path, folder.metrics.kind)
        self._others = [
            LogTail(lines.path, lines.kind) for lines in folder.logs if lines is not folder.metrics
        ]
        self._waiting: list[Entry] = []
        self._bound = -1

    def new(self, *, ended: bool) -> list[Entry]:
        """What was written since the last call, up to the last row of metrics.jsonl; where the run has `ended`, all.

        What a run writes of a step, or before it, is there once a row of a later step is; so metrics.jsonl is read
        first, and what is ahead of it waits.
        """
        steps = self._steps.new()
        self._bound = max([self._bound, *(entry.step for entry in steps)])
        found = self._waiting + steps + [entry for tail in self._others for entry in tail.new()]
        ready = [entry for entry in found if ended or entry.step <= self._bound]
        self._waiting = [entry for entry in found if not (ended or entry.step <= self._bound)]
        return sorted(ready, key=lambda entry: entry.step)
