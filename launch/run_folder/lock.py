"""One run per folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from flexlora_ds.errors import RunError
from flexlora_ds.files.lock import locked

LOCK_FILE = ".lock"


@contextmanager
def one_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; on a file system without locks there is none.

    Raises:
        RunError: another process holds it; it is named.
    """

    def refuse(holder: str) -> NoReturn:
        raise RunError(
            f"another run is writing to this folder: {holder}",
            str(folder),
            "wait for it, or choose another out",
        )

    with locked(folder / LOCK_FILE, refuse):
        yield
