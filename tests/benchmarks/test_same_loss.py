"""The comparison of the adapter's two forms trains both, with rank changes, and says where they part."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import run_module
from tests.helpers.training import SMALL, make_place

pytestmark = pytest.mark.full


def same_loss(*words: str) -> subprocess.CompletedProcess[str]:
    return run_module("benchmarks.same_loss", *words)


def test_both_forms_train_alike(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    options = {"model": place.model, "data": place.data, "recipe": "demo", **SMALL}
    done = same_loss(*(f"--{key}={value}" for key, value in options.items()))
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"{SMALL['max_steps']} steps: the losses differ by ")
    assert last.endswith("same ranks: True")


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    done = same_loss("--model", str(place.model), "--data", str(tmp_path / "none.json"), "--recipe", "demo")
    assert done.returncode == 2
    assert "no training data at" in done.stderr and "Traceback" not in done.stderr
