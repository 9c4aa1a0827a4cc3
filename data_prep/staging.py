"""Writing a set of files so that an interruption at any moment leaves the old set or the new one.

Files are written into `<out>/.building`. When all are there, that folder is renamed to `<out>/.ready` (the
commit point), then its files are moved to their places, the manifest last. A run that finds `.ready` finishes
the moves; one that finds `.building` throws it away. Both folders bear a marker: what bears none is not a build's,
and stays. One process at a time: the folder itself is locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.files.lock import take_lock
from flexlora_ds.files.ownership import claim, claimed, holds_only, remove_claimed
from flexlora_ds.files.reading import read_json_object

MANIFEST = "manifest.json"
_BUILDING, _READY = ".building", ".ready"
_PURPOSE = "build"
_NOTHING = re.compile("(?!)")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Own the folder `out`: made if needed, removed if it stays empty; what a killed run left is put right.

    Raises UserError where `out` is no folder, cannot be written, or another process owns it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(
            f"cannot be used as output folder: {error.strerror}", str(out), "choose another --out"
        ) from None
    try:
        _lock(handle, out)
        _require_ours(out)
        if (out / _READY).is_dir():
            _move(out)
        remove_claimed(out / _BUILDING, _PURPOSE)
        try:
            yield
        finally:
            remove_claimed(out / _BUILDING, _PURPOSE)
            if not any(out.iterdir()):
                out.rmdir()
    finally:
        os.close(handle)


def _require_ours(out: Path) -> None:
    for folder in (out / _BUILDING, out / _READY):
        # Empty: of a build that was killed before it left its marker.
        ours = holds_only(folder, _NOTHING) or claimed(folder, _PURPOSE)
        if os.path.lexists(folder) and (folder.is_symlink() or not ours):
            raise UserError(
                f"holds {folder.name}, which no build of this version wrote",
                str(out),
                "remove it, or choose another --out",
            )


def _lock(handle: int, out: Path) -> None:
    def refuse(holder: str) -> None:
        raise UserError("another build is writing here", str(out), "wait for it to end")

    # Network file systems may refuse locks on folders: build without one rather than not at all.
    with contextlib.suppress(OSError):
        take_lock(handle, refuse)


def staging(out: Path) -> Path:
    """The empty folder to write into, inside `locked(out)`."""
    folder = out / _BUILDING
    claim(folder, _PURPOSE)
    return folder


def commit(out: Path, manifest: dict[str, Any]) -> None:
    """Put the staged files in place; remove files that the old manifest lists and the new one does not."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (out / _BUILDING / MANIFEST).write_text(text, encoding="utf-8")
    (out / _BUILDING).rename(out / _READY)
    _move(out)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished build, or None."""
    try:
        manifest = read_json_object(out / MANIFEST)
    except UserError:
        return None
    files = manifest.get("files")
    listed = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    return manifest if listed else None


def _move(out: Path) -> None:
    ready = out / _READY
    new = read_manifest(ready)
    if new is not None:  # else a killed run had moved everything, the manifest last
        for name in new["files"]:
            if (ready / name).exists():  # else a killed run had moved it
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).replace(out / name)
        for name, entry in (read_manifest(out) or {"files": {}})["files"].items():
            if name not in new["files"]:
                _remove(out, name, entry)
        (ready / MANIFEST).replace(out / MANIFEST)
    remove_claimed(ready, _PURPOSE)


def _remove(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Remove a file that an earlier build wrote, and nobody changed since."""
    path = out / name
    inside = path.resolve().is_relative_to(out.resolve())  # a manifest is a file anyone can edit
    if inside and path.is_file() and sha256_of(path) == entry.get("sha256"):
        path.unlink()
        if path.parent != out and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
