"""The home directory in a path that no shell has seen to: of a recipe, or behind a sign as in `--out=~/run`."""

from __future__ import annotations

import contextlib
from pathlib import Path


def at_home(path: str) -> str:
    """A path with the home directory for a leading `~` or `~user`; where there is none, as it was."""
    if path.startswith("~"):
        with contextlib.suppress(RuntimeError, ValueError):  # no such user, or a name that no system can hold
            return str(Path(path).expanduser())
    return path
