"""The folder of predictions: one evaluation at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eval.predictions import PredictionFolder
from flexlora_ds.errors import RunError


def test_a_folder_is_for_one_evaluation_at_a_time(tmp_path: Path) -> None:
    first = PredictionFolder(tmp_path / "out")
    first.lock()
    with pytest.raises(RunError, match=rf"another evaluation is writing here: process {os.getpid()} .*--out"):
        PredictionFolder(tmp_path / "out").lock(patience=0.0)
    del first  # as where an evaluation ends in a process that goes on
    PredictionFolder(tmp_path / "out").lock(patience=0.0)


def test_what_a_killed_evaluation_left_unfinished_is_removed(tmp_path: Path) -> None:
    """Under the lock, and nothing that is not ours."""
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    ours = [
        tmp_path / ".results.json.4711.part",
        tmp_path / ".table.md.1-2.part",
        predictions / ".boolq.jsonl.9.part",
    ]
    others = [
        tmp_path / ".notes.md.4711.part",
        tmp_path / ".results.json.mine.part",
        tmp_path / "results.json.4711.part",
        predictions / ".mine.jsonl.9.part",
    ]
    for path in [*ours, *others]:
        path.write_text("{")
    link = tmp_path / ".settings.json.1.part"
    link.symlink_to(others[0])
    first = PredictionFolder(tmp_path)
    first.lock()
    assert not any(path.exists() for path in ours) and all(path.exists() for path in others)
    assert link.is_symlink()
    ours[0].write_text("{")
    with pytest.raises(RunError):
        PredictionFolder(tmp_path).lock(patience=0.0)
    assert ours[0].exists()


def test_a_file_where_the_folder_is_meant_is_said_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match=r"cannot make the folder: File exists.*; choose another"):
        PredictionFolder(tmp_path / "file").lock()
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(RunError, match=r"cannot write: Is a directory.*; see what is there, or name another"):
        PredictionFolder(tmp_path).check_settings({})
