"""Text files: the old one or the new one, never a part of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flexlora_ds.errors import RunError
from flexlora_ds.files import text
from flexlora_ds.files.text import write_json_atomically, write_text_atomically


def test_a_folder_is_made_and_a_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json_atomically(path, {"λ": 1})
    write_json_atomically(path, {"λ": 2})
    assert json.loads(path.read_text()) == {"λ": 2} and path.read_text().endswith("}\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / f".latest.{os.getpid()}.part").symlink_to(mine)
    (tmp_path / f".latest.{os.getpid()}-1.part").mkdir()
    write_text_atomically(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "new" and mine.read_text() == "mine"
    assert not (tmp_path / "latest").is_symlink()
