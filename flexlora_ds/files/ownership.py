"""Whether a folder is ours: nothing is removed that a marker, or the names of our own files, does not claim."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

MARKER = ".flexlora_ds"
"""The file by which a folder is ours: what for, one word a line."""

_LONGEST = 4096  # bytes of a marker


def claim(folder: Path, purpose: str) -> None:
    """Mark a folder, made if it is missing, as ours for `purpose`, one word. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not claimed(folder, purpose):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(folder / MARKER, flags, 0o644)
        try:
            os.write(descriptor, f"{purpose}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def claimed(folder: Path, purpose: str) -> bool:
    """Whether the marker of a folder says that it is ours for `purpose`; a link in the marker's place says nothing."""
    try:
        descriptor = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        ordinary = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return ordinary and purpose.encode() in os.read(descriptor, _LONGEST).splitlines()
    finally:
        os.close(descriptor)


def remove_claimed(folder: Path, purpose: str) -> None:
    """Remove a folder that is ours for `purpose`, its marker last: a kill meanwhile leaves it ours. Raises OSError."""
    if claimed(folder, purpose) and not folder.is_symlink():
        remove_entries(folder, [path.name for path in folder.iterdir() if path.name != MARKER])
        shutil.rmtree(folder)


def remove_entries(folder: Path, names: Collection[str]) -> None:
    """Remove what has these names in a folder that is ours; all else stays. Raises OSError."""
    for name in names:
        remove(folder / name)


def remove(path: Path) -> None:
    """Remove a file or a folder of ours; of a link the link alone. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether a path is a folder, and no link to one, that holds nothing but ordinary files with our names."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return all(e.is_file(follow_symlinks=False) and names.fullmatch(e.name) for e in entries)


def remove_if_ours(folder: Path, names: re.Pattern[str]) -> bool:
    """Remove a folder that `holds_only` files with our names; whether the path is free now. Raises OSError."""
    if holds_only(folder, names):
        shutil.rmtree(folder)
    return not os.path.lexists(folder)


def set_aside(path: Path) -> Path:
    """Rename what is not ours, so that its name is free; the new name, `set_aside_…`. Raises OSError."""
    target = path.with_name(f"set_aside_{path.name.lstrip('.')}")
    free, number = target, 2
    while os.path.lexists(free):
        free = target.with_name(f"{target.name}_{number}")
        number += 1
    path.rename(free)
    return free
