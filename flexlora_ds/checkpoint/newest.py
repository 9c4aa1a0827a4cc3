"""Which of several checkpoints a run goes on from."""

from __future__ import annotations

from pathlib import Path

from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.state import Checkpoint, open_checkpoint
from flexlora_ds.errors import RunError


def newest_valid(root: Path, mend: str) -> tuple[Checkpoint, list[files.DamagedError]]:
    """The newest valid checkpoint below `root`, and what was found damaged on the way to it.

    Raises:
        RunError: none is valid; `mend` says what to do.
    """
    damage: list[files.DamagedError] = []
    for folder in files.checkpoints_in(root):
        try:
            return open_checkpoint(folder), damage
        except files.DamagedError as error:
            damage.append(error)
    found = damage[0] if damage else f"all were removed ({root})"
    raise RunError(f"no valid checkpoint is left of those completed here: {found}", mend=mend)
