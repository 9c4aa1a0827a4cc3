"""An earlier demo in the folder of a new one: replaced where its marker says that a demo wrote it."""

from __future__ import annotations

from pathlib import Path

from flexlora_ds.errors import UserError
from flexlora_ds.files.ownership import claim, claimed, remove_entries
from launch.demo.evaluations import AFTER, AFTER_GENERATE, BEFORE
from launch.run_folder.claim import RUN_ENTRIES
from launch.run_folder.lock import LOCK_FILE, one_run_in

_COMPARISON = ("comparison.md", "comparison.png")
_ENTRIES = (*RUN_ENTRIES, "data", "base", BEFORE, AFTER, AFTER_GENERATE, *_COMPARISON)
"""All that a demo and the run in it write."""


def replace_earlier(out: Path, demo: str) -> None:
    """Make `out` the folder of a new demo: what an earlier one of the same name wrote is removed, all else stays.

    Raises:
        UserError: `out` is no folder, or holds something that no such demo wrote. RunError: a run is writing there.
    """
    if out.exists() and not out.is_dir():
        raise UserError("not a folder", f"--out {out}", "choose another")
    if claimed(out, demo):
        with one_run_in(out):
            remove_entries(out, _ENTRIES)
    elif out.exists() and any(path.name != LOCK_FILE for path in out.iterdir()):
        raise UserError(
            f"the folder holds something that no {demo} of this version wrote",
            f"--out {out}",
            "remove it yourself, or choose another",
        )
    claim(out, demo)
