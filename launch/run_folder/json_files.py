"""JSON on disk that survives a crash: logs that can be shortened to a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError
from flexlora_ds.files.text import write_text_atomically


class JsonLines:
    """A file of one JSON object a line, each with a `step`, in ascending order."""

    def __init__(self, path: Path, is_rank_zero: bool = True) -> None:
        self.path = path
        self._is_rank_zero = is_rank_zero

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object and hand it to the operating system at once; RunError where the disk refuses."""
        if not self._is_rank_zero:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(row) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write: {error.strerror}", str(self.path), "free some space and resume"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, or none where there is no file; RunError names the first line that is not JSON."""
        return list(self._rows())

    def truncate_after(self, step: int) -> None:
        """Keep the rows up to `step`; a crash meanwhile leaves the old file or the new one."""
        if self._is_rank_zero and self.path.exists():
            kept = [to_json(row) + "\n" for row in self._rows() if row["step"] <= step]
            write_text_atomically(self.path, "".join(kept))

    def _rows(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is a torn write
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict) or "step" not in row:
                raise RunError(
                    "not a row of a run", f"{self.path}, line {number}", "remove the line"
                ) from None
            yield row


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
