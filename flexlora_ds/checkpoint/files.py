"""The files of checkpoints: appear complete or not at all, and prove it before anything is read from them.

    checkpoints/step_00001000/   state.json, state-00001-of-00002.safetensors, ..., manifest.json (sizes, SHA-256)
    checkpoints/latest           the name of the newest one

A checkpoint is written into `.step_00001000.part`; the manifest comes last; every file and the folder are synced; one
rename makes it a checkpoint. So a folder `step_*` was complete once, and what is wrong with it now is damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.folders import bring_to_disk
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.files.ownership import holds_only, remove_if_ours, set_aside
from flexlora_ds.files.text import replace_content

FORMAT = 1
"""The version of the layout; a reader refuses any other."""

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
_FOLDER = re.compile(r"step_(\d{8,})")
_SCRATCH = re.compile(r"\.step_\d{8,}\.(part|old)")
_LATEST_PART = re.compile(rf"\.{LATEST}\.(\d+(-\d+)?\.)?part")
_OURS = re.compile(r"state\.json|state-\d{5,}-of-\d{5,}\.safetensors|manifest\.json")
_PLAIN_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.-]*"
)  # no separator, no leading dot: nothing outside the folder


class DamagedError(RunError):
    """A checkpoint that is not what was written: which file, and how."""


@dataclass(frozen=True)
class FileEntry:
    """One file as the manifest knows it."""

    name: str
    size: int
    sha256: str


def folder_name(step: int) -> str:
    """`step_00001000`."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder.

    Raises:
        UserError: the name is none of a checkpoint.
    """
    match = _FOLDER.fullmatch(folder.name)
    if match is None:
        raise UserError(
            "not a checkpoint", str(folder), f"give a folder like checkpoints/{folder_name(1000)}"
        )
    return int(match[1])


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints below `root`, newest first; damaged ones among them."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _FOLDER.fullmatch(p.name)), key=step_of, reverse=True)


def ever_held_one(root: Path) -> bool:
    """Whether a checkpoint was completed below `root` at some time, still there or not."""
    return (root / LATEST).exists() or bool(checkpoints_in(root))


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what an interrupted save left is removed.

    What bears the name of such a folder and is none of ours is renamed.
    """
    if not root.is_dir():
        root.mkdir(parents=True)
        bring_to_disk(root.parent)
    for rest in root.iterdir():
        if _LATEST_PART.fullmatch(rest.name) and rest.is_file():
            rest.unlink()
        if _SCRATCH.fullmatch(rest.name) and not remove_if_ours(rest, _OURS):
            set_aside(rest)
    part = root / f".{folder_name(step)}.part"
    part.mkdir()
    return part


def seal(path: Path) -> FileEntry:
    """Bring a written file to the disk; its entry for the manifest."""
    bring_to_disk(path)
    return FileEntry(path.name, path.stat().st_size, sha256_of(path))


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON."""
    path.write_text(canonical(value), encoding="utf-8")


def canonical(value: Any) -> str:
    """JSON with one spelling for each value: sorted keys, no NaN."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def commit(part: Path, entries: Iterable[FileEntry]) -> Path:
    """Write the manifest and make the folder a checkpoint; afterwards `latest` names it."""
    files = [asdict(entry) for entry in sorted(entries, key=lambda e: e.name)]
    body = {"format": FORMAT, "files": files}
    write_json(part / MANIFEST, {**body, "sha256": _digest(body)})
    seal(part / MANIFEST)
    bring_to_disk(part)
    folder = part.with_name(part.name[1 : -len(".part")])
    if os.path.lexists(folder):  # the same step again, after a damaged one
        _remove(folder)
    part.rename(folder)
    bring_to_disk(folder.parent)
    _point_at(folder)
    return folder


def discard(part: Path) -> None:
    """Remove a checkpoint that could not be completed."""
    with contextlib.suppress(OSError):
        remove_if_ours(part, _OURS)


def keep_newest(root: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints; one with a file that is not ours stays."""
    for folder in checkpoints_in(root)[max(1, count) :]:
        if (folder / MANIFEST).exists() and holds_only(folder, _OURS):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Free a checkpoint's name: renamed first, so that none is ever seen half-removed; what is not ours stays aside."""
    if holds_only(folder, _OURS):
        doomed = folder.with_name(f".{folder.name}.old")
        folder.rename(doomed)
        with contextlib.suppress(OSError):
            remove_if_ours(doomed, _OURS)
    else:
        set_aside(folder)


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, damaged ones or of a course that was given up; returns their new names.

    From then on the newest checkpoint is again the run's latest.
    """
    aside = []
    for folder in checkpoints_in(root):
        if step_of(folder) > step:
            aside.append(set_aside(folder))
    return aside


def verify(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, after reading every byte of each; nothing is loaded.

    Raises:
        DamagedError: a file is missing, of another size or content, or the manifest is not as written.
        RunError: another format version.
    """
    entries = _read_manifest(folder)
    for entry in entries:
        if sha256_of(_sized(folder, entry)) != entry.sha256:
            raise DamagedError(f"{entry.name} is not what was written: its SHA-256 differs", str(folder))
    return listed(folder)


def listed(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, after comparing the sizes only. Raises as `verify`."""
    files = {entry.name: _sized(folder, entry) for entry in _read_manifest(folder)}
    if STATE not in files:
        raise DamagedError(f"the manifest names no {STATE}", str(folder))
    return files


def _sized(folder: Path, entry: FileEntry) -> Path:
    path = folder / entry.name
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{entry.name} is missing", str(folder))
    size = path.stat().st_size
    if size != entry.size:
        raise DamagedError(f"{entry.name} has {size} bytes instead of {entry.size}", str(folder))
    return path


def _read_manifest(folder: Path) -> list[FileEntry]:
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text)
        body = {"format": value["format"], "files": value["files"]}
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing", str(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {type(error).__name__}", str(folder)) from None
    if text != canonical({**body, "sha256": _digest(body)}):
        raise DamagedError(f"{MANIFEST} is not what was written", str(folder))
    if value["format"] != FORMAT:
        raise RunError(
            f"the checkpoint has format version {value['format']}, this program reads {FORMAT}",
            str(folder),
            "use the program's version that wrote it",
        )
    return _entries(value["files"], folder)


def _entries(values: Any, folder: Path) -> list[FileEntry]:
    try:
        entries = [FileEntry(str(v["name"]), int(v["size"]), str(v["sha256"])) for v in values]
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{MANIFEST} lists no files", str(folder)) from None
    for entry in entries:
        if not _PLAIN_NAME.fullmatch(entry.name):
            raise DamagedError(f"{MANIFEST} names {entry.name!r}, which is no plain file name", str(folder))
    return entries


def _digest(body: Any) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def _point_at(folder: Path) -> None:
    replace_content(folder.with_name(LATEST), f"{folder.name}\n".encode())
