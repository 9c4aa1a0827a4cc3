"""A folder whose files are listed with their sizes and SHA-256, the list last: what is changed later is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.files.folders import bring_to_disk
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.files.reading import open_ordinary, read_json_object

SEAL = "seal.json"
"""The list, a file of the folder."""


def seal_folder(folder: Path) -> None:
    """Bring every file of a folder to the disk, then write their list. Raises OSError."""
    for path in folder.iterdir():
        bring_to_disk(path)
    entries = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    bring_to_disk(folder / SEAL)
    bring_to_disk(folder)


def broken_seal(folder: Path) -> str | None:
    """What differs from the folder that was sealed, every byte read; None where nothing does.

    A file that was added is no difference.
    """
    try:
        entries = read_json_object(folder / SEAL)
        for name, entry in entries.items():
            if "/" in name:
                return f"{SEAL} is not what was written"
            open_ordinary(folder / name).close()  # a named pipe would wait for a writer
            if _entry(folder / name) != entry:
                return f"{name} is not what was written"
    except (UserError, OSError) as error:
        return str(error)
    return None if entries else f"{SEAL} lists no file"


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
