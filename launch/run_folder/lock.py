"""One run per folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from flexlora_ds.errors import RunError
from flexlora_ds.files.lock import locked

LOCK_FILE = ".lock"

_DRY_RUNS = 5.0  # seconds: every process of a dry run looks, and holds the lock for a moment


@contextmanager
def one_run_in(folder: Path, *, patience: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock; on a file system without locks there is none.

    Args:
        patience: seconds to wait for another holder.

    Yields:
        What raises RunError where the folder is no more the one in which the lock was taken.

    Raises:
        RunError: another process holds it; it is named.
    """

    with locked(folder / LOCK_FILE, lambda holder: _refuse(folder, holder), patience=patience):
        begun = _identity(folder)

        def require() -> None:
            if _identity(folder) != begun:
                raise RunError(
                    "the run folder was moved, removed or replaced while the run wrote to it",
                    str(folder),
                    "put it back and start again: the run continues after its last checkpoint",
                )

        yield require


def require_free(folder: Path) -> None:
    """Raise RunError as `one_run_in` would, without leaving a lock file behind: for a dry run."""
    if (folder / LOCK_FILE).exists():
        with one_run_in(folder, patience=_DRY_RUNS):
            pass


def _refuse(folder: Path, holder: str) -> NoReturn:
    raise RunError(
        f"another run is writing to this folder: {holder}", str(folder), "wait for it, or choose another out"
    )


def _identity(folder: Path) -> tuple[object, ...] | None:
    """Which folder a path leads to: whether by a link, and which file its lock is.

    The lock file is open while the run lives, so no other file gets its number.
    """
    try:
        found = [os.lstat(folder), os.lstat(folder / LOCK_FILE)]
    except OSError:
        return None
    return stat.S_IFMT(found[0].st_mode), *((s.st_dev, s.st_ino) for s in found)
