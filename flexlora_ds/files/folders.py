"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from flexlora_ds.errors import UserError
from flexlora_ds.files.lock import take_lock
from flexlora_ds.files.ownership import MARKER, claim, claimed, remove, remove_claimed

_PURPOSE = "scratch"
_NEW, _OLD = "new", "old"


def bring_to_disk(path: Path) -> None:
    """Flush what was written to a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_new(folder: Path, place: str) -> None:
    """Raise UserError where a folder to write holds anything, or is no folder; `place` names the option."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{place} {folder} exists and is not empty", mend="give a new folder")


@contextmanager
def replacing_folder(folder: Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write into; on success its files are the ones in `folder`.

    Of an existing folder the files named in `owned` are dropped, and those that were written anew. All others stay.
    After an exception `folder` is as it was. Renames are atomic within a file system. Between the two that replace
    an existing folder, its old content lies beside it in a scratch folder that bears our marker. The next
    replacement puts back what a killed one left there.

    Raises:
        UserError: `folder` is a file.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError("a file where a folder is to be written", str(folder), "remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder, owned)
    with _scratch_beside(folder) as scratch:
        fresh = scratch / _NEW
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(scratch / _OLD)
        try:
            fresh.rename(folder)
        finally:
            _put_back(scratch / _OLD, folder, owned)


@contextmanager
def _scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder of this process alone, marked as ours and locked while it is in use, removed at the end."""
    scratch = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        claim(scratch, _PURPOSE)
        with _locked(scratch):
            yield scratch
    finally:
        if not (scratch / _OLD).exists():  # else a rename failed: what it holds is the user's
            with contextlib.suppress(OSError):
                remove_claimed(scratch, _PURPOSE)


def _recover(folder: Path, owned: Collection[str]) -> None:
    """Put back, and remove, what killed processes left in scratch folders of ours."""
    for scratch in folder.parent.glob(f"{_glob_literal(_prefix(folder))}*"):
        if not scratch.is_symlink() and claimed(scratch, _PURPOSE):
            with _locked(scratch) as free:
                if free:
                    _put_back(scratch / _OLD, folder, owned)
                    remove_claimed(scratch, _PURPOSE)


def _put_back(old: Path, folder: Path, owned: Collection[str]) -> None:
    """Move what `old` holds and `folder` lacks into it, without the files that the new ones replace."""
    if not old.exists():
        return
    if not folder.exists():
        old.rename(folder)
        return
    for path in old.iterdir():
        if path.name not in owned and not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    remove(old)


class _BusyError(Exception):
    """Another process holds the lock."""


@contextmanager
def _locked(scratch: Path) -> Iterator[bool]:
    """Hold a scratch folder's lock; False where its process lives, or nobody can know."""

    def refuse(holder: str) -> None:
        raise _BusyError

    descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        free = False
        with contextlib.suppress(_BusyError):
            free = take_lock(descriptor, refuse)
        yield free
    finally:
        os.close(descriptor)


def _prefix(folder: Path) -> str:
    return f".{folder.name}{MARKER}-"


def _glob_literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
