"""JSON on disk that survives a crash: logs that can be shortened to a step, and compared with a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError
from flexlora_ds.files.reading import JSON_FAULTS, json_fault, open_ordinary
from flexlora_ds.files.text import cannot_write, write_bytes_atomically
from launch.run_folder.rows import Check, fault_of, is_count

_MEND = "restore the file, or remove the line"
_STEP: Mapping[str, Check] = {"step": is_count}


class JsonLines:
    """A file of one JSON object a line, each with a `step`, in ascending order.

    `kind`: what each key of a row may hold. Rows and digest are counted while they are written.
    """

    def __init__(self, path: Path, is_rank_zero: bool = True, kind: Mapping[str, Check] = _STEP) -> None:
        self.path = path
        self._is_rank_zero = is_rank_zero
        self.kind = kind
        self._count, self._digest = 0, hashlib.sha256()

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object and hand it to the operating system at once; RunError where the disk refuses."""
        if not self._is_rank_zero:
            return
        line = (to_json(row) + "\n").encode()
        try:
            with open(self.path, "ab", opener=_without_waiting) as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(error, self.path) from error
        self._count += 1
        self._digest.update(line)

    def seal(self) -> dict[str, Any]:
        """The number of rows so far and their SHA-256: a checkpoint's part of the log."""
        return {"rows": self._count, "sha256": self._digest.hexdigest()}

    def require(self, seal: Mapping[str, Any], mend: str) -> None:
        """Compare the file's first rows with a `seal`.

        Raises:
            RunError: rows are missing, or are not those that were written; `mend` is the remedy.
            UserError: something else than an ordinary file is in its place.
        """
        digest, count = hashlib.sha256(), 0
        for line, _ in self._numbered():
            if count == seal["rows"]:
                break
            digest.update(line)
            count += 1
        if count < seal["rows"]:
            raise RunError(
                f"the log has lost rows: {count} are left of the {seal['rows']} before the checkpoint",
                str(self.path),
                mend,
            )
        if digest.hexdigest() != seal["sha256"]:
            raise RunError(
                f"the log was changed: its first {count} rows are not those before the checkpoint",
                f"{self.path}{self._first_odd(count)}",
                mend,
            )

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, or none where there is no file.

        Raises:
            RunError: a line is no row of this log; the first is named.
            UserError: something else than an ordinary file is in its place.
        """
        return [row for _, row in self._rows()]

    def start_anew(self) -> None:
        """Begin to count at no row: the file was removed."""
        self._count, self._digest = 0, hashlib.sha256()

    def truncate_after(self, step: int) -> None:
        """Keep the rows up to `step`, and count on from there; a crash leaves the old file or the new one."""
        self.start_anew()
        if self._is_rank_zero and self.path.exists():
            kept = [line for line, row in self._rows() if row["step"] <= step]
            self._count = len(kept)
            self._digest.update(b"".join(kept))
            write_bytes_atomically(self.path, b"".join(kept))

    def _rows(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        before = 0
        for line, number in self._numbered():
            row, fault = self._parsed(line)
            if fault is None and row["step"] < before:
                fault = f"step {row['step']:,} behind step {before:,}"
            if fault is not None:
                raise RunError(f"not a row of a run: {fault}", f"{self.path}, line {number}", _MEND)
            before = row["step"]
            yield line, row

    def _parsed(self, line: bytes) -> tuple[Any, str | None]:
        try:
            row = json.loads(line.decode())
        except JSON_FAULTS as error:
            return None, json_fault(error)
        return row, fault_of(row, self.kind)

    def _numbered(self) -> Iterator[tuple[bytes, int]]:
        """The lines with their numbers, each with its line feed; what follows the last one is a torn write."""
        if not os.path.lexists(self.path):
            return
        with open_ordinary(self.path, "move it away, or restore the file") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield line, number

    def _first_odd(self, count: int) -> str:
        """The first line that is no row, where there is one: a changed digit shows in none."""
        for line, number in self._numbered():
            if number <= count and self._parsed(line)[1] is not None:
                return f", line {number}"
        return ""


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)  # a named pipe would wait for a reader


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: numbers that are not finite become null, tensor and array scalars plain numbers."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
