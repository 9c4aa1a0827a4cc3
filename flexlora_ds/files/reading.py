"""Files from outside: ordinary files only, UTF-8 text and JSON, each fault in one line that names the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flexlora_ds.errors import UserError

MIB = 1 << 20

JSON_FAULTS = (ValueError, RecursionError)
"""What json.loads raises: no JSON, no UTF-8, a number of thousands of digits, nesting without end."""


def open_ordinary(path: Path, mend: str = "") -> BinaryIO:
    """A file opened for reading in binary; a device or a named pipe is refused before anything waits for it.

    Raises:
        UserError: no such file, not an ordinary one, or not readable; `mend` is its remedy.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(error, path, mend) from None
    except ValueError as error:  # a null character in the name
        raise UserError(f"no file can have this name: {error}", repr(str(path)), mend) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("not an ordinary file", str(path), mend)
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, mend: str = "", *, limit: int = 64 * MIB) -> str:
    """The UTF-8 text of an ordinary file, without its byte-order mark.

    Raises:
        UserError: as `open_ordinary`; not UTF-8; more than `limit` bytes.
    """
    with open_ordinary(path, mend) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(error, path, mend) from None
    if len(data) > limit:
        raise UserError(f"longer than {limit // MIB} MiB", str(path), mend)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason} at byte {error.start}", str(path), mend) from None


def read_json(
    path: Path,
    mend: str = "",
    *,
    limit: int = 64 * MIB,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value in a JSON file. Raises UserError as `read_text`, or with the line that is not JSON."""
    text = read_text(path, mend, limit=limit)
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except UserError:  # from the hook
        raise
    except JSON_FAULTS as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"not valid JSON: {json_fault(error)}", f"{path}{line}", mend) from None


def read_json_object(path: Path, mend: str = "", *, limit: int = 64 * MIB) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object; another value is a UserError too."""
    value = read_json(path, mend, limit=limit)
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__} where an object is expected", str(path), mend)
    return value


def json_fault(error: BaseException) -> str:
    """What one of `JSON_FAULTS` says, in our words where Python's need knowledge of Python."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    return "a number has thousands of digits" if "digits" in str(error) else str(error)


def _unreadable(error: OSError, path: Path, mend: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError("no such file", str(path), mend)
    return UserError(f"cannot be read: {error.strerror or error}", str(path), mend)
