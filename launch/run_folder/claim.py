"""Whether a folder is a run's: a run writes over nothing that no run wrote."""

from __future__ import annotations

import os
from pathlib import Path

from flexlora_ds.checkpoint.files import MANIFEST, checkpoints_in
from flexlora_ds.errors import CommandError, UserError
from flexlora_ds.files.ownership import claim, claimed
from flexlora_ds.files.reading import open_ordinary

LOGS = ("metrics.jsonl", "ranks.jsonl", "validation.jsonl", "accuracy.jsonl")
WRITTEN = (*LOGS, "options.yaml", "summary.json", "spectra.json", "directions.json", "tracking")
"""What a run writes beside its checkpoints, adapter and report; `tracking` is a folder, of its trackers."""

RUN_ENTRIES = (*WRITTEN, "adapter", "model", "report", "checkpoints")
"""All that a run writes into its folder, but for its lock and its marker."""

_PURPOSE = "run"
_HEADING = b"# Made from "


def claim_run_folder(folder: Path) -> None:
    """Mark a folder as a run's. Raises OSError."""
    claim(folder, _PURPOSE)


def require_no_other(folder: Path) -> None:
    """Refuse a folder in which a run would write over what no run wrote; write nothing.

    A folder of a user's own checkpoints is none: a run adds to it, and removes its own only.

    Raises:
        UserError: the folder holds a file or folder with a name that a run writes, and bears no run's marker.
    """
    if claimed(folder, _PURPOSE) or _is_older_run(folder):
        return
    found = [name for name in RUN_ENTRIES if name != "checkpoints" and os.path.lexists(folder / name)]
    found = [name for name in found if not _is_empty_folder(folder / name)]
    if found:
        raise UserError(
            f"the folder holds {found[0]}, which no run of ours wrote", str(folder), "choose another out"
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_older_run(folder: Path) -> bool:
    """Whether a run wrote here before runs left a marker: by its options or a checkpoint."""
    options = _beginning(folder / "options.yaml")
    held = checkpoints_in(folder / "checkpoints")
    return options.startswith(_HEADING) or any((path / MANIFEST).is_file() for path in held)


def _beginning(path: Path) -> bytes:
    try:
        with open_ordinary(path) as file:
            return file.read(100)
    except (CommandError, OSError):
        return b""
