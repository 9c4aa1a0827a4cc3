"""How far a tracker has come: a small file beside its own, so that a run that goes on repeats nothing."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flexlora_ds.errors import RunError
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.files.text import write_json_atomically
from launch.run_folder.rows import fault_of, is_count, is_text, object_of
from launch.trackers.log_tail import Entry

_MEND = "remove the file: the tracker then begins a run of its own"


@dataclass
class Told:
    """What a tracker was told."""

    id: str | None = None
    """By which it knows the run."""
    last: dict[str, int] = field(default_factory=dict)
    """By log, the step of the last row that it was given."""

    @classmethod
    def read(cls, path: Path) -> Told:
        """As `write` left it; nothing where there is no file.

        Raises:
            RunError: it was not written by a tracker. UserError: it is no ordinary file.
        """
        if not os.path.lexists(path):
            return cls()
        said = read_json_object(path, _MEND)
        fault = fault_of(said, {"id": is_text, "last": object_of(is_count)})
        if fault is not None:
            raise RunError(f"not written by a tracker: {fault}", str(path), _MEND)
        return cls(said["id"], said["last"])

    def write(self, path: Path) -> None:
        """Replace the file. Raises OSError."""
        write_json_atomically(path, asdict(self))

    def lacks(self, entry: Entry) -> bool:
        """Whether a row is still to be told."""
        return entry.step > self.last.get(entry.log, -1)

    def add(self, entry: Entry) -> None:
        """Note a row that was told."""
        self.last[entry.log] = entry.step

    def take_back(self, step: int) -> None:
        """Forget what was told of the steps after `step`."""
        self.last = {log: min(last, step) for log, last in self.last.items()}
