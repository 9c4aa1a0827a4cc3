"""What can happen to a run folder while a run writes to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def _rename(folder: Path) -> Path:
    return folder.rename(folder.with_name("moved"))


def _replace(folder: Path) -> None:
    shutil.copytree(_rename(folder), folder)


def _link(folder: Path) -> None:
    folder.symlink_to(_rename(folder))


MOVES: dict[str, Callable[[Path], object]] = {
    "renamed": _rename,
    "removed": shutil.rmtree,
    "replaced by a copy": _replace,
    "replaced by a link to itself": _link,
    "lock removed": lambda folder: (folder / ".lock").unlink(),
    "lock made anew": lambda folder: ((folder / ".lock").unlink(), (folder / ".lock").touch())[1],
}
"""By name; each leaves what the folder held under `moved` beside it, but for the removals."""
