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
