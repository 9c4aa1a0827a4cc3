"""Text files that appear complete or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError
from flexlora_ds.files.folders import bring_to_disk


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: readers, and a crash, see the old file or the new one.

    The folder is made if it is missing. Raises RunError where the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        bring_to_disk(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write: {error.strerror}", str(path), "free some space and resume") from error


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_text_atomically` of indented JSON with a final newline."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
