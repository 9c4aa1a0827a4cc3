"""Text files that appear complete or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from flexlora_ds.errors import RunError
from flexlora_ds.files.folders import bring_to_disk

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_PART = re.compile(r"\.(?P<name>.+)\.\d+(-\d+)?\.part")


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: readers, and a crash, see the old file or the new one.

    The folder is made if it is missing. Raises RunError where the file cannot be written.
    """
    # A file's name may hold what is no UTF-8: it is written as JSON writes it.
    write_bytes_atomically(path, text.encode(errors="backslashreplace"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_text_atomically`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_content(path, content)
    except OSError as error:
        raise cannot_write(error, path) from error


def cannot_write(error: OSError, path: Path) -> RunError:
    """What is said of a write that the system refused, with the remedy for a full disk or for another reason."""
    full = error.errno in _FULL
    mend = "free some space and resume" if full else "see what is there, or name another folder"
    return RunError(f"cannot write: {error.strerror}", str(path), mend)


def replace_content(path: Path, content: bytes) -> None:
    """As `write_bytes_atomically`, in a folder that is there. Raises OSError."""
    part, file = _open_part(path)
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    bring_to_disk(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_text_atomically` of indented JSON with a final newline. Raises ValueError for NaN, which JSON has not."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def remove_parts(folder: Path, names: Collection[str]) -> None:
    """Remove what killed processes left unfinished of the files in `names`; nobody may be writing them meanwhile."""
    for part in folder.glob(".*.part"):
        found = _PART.fullmatch(part.name)
        if found and found["name"] in names and part.is_file() and not part.is_symlink():
            part.unlink(missing_ok=True)


def _open_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`: never one that is there, and never what a link in its place leads to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for number in itertools.count():
        part = path.with_name(f".{path.name}.{os.getpid()}{f'-{number}' if number else ''}.part")
        try:
            return part, os.fdopen(os.open(part, flags, 0o666), "wb")
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
