"""The comparison of settings runs each once, reads what they came to, and names the run that failed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.learning.settings import RIVALS
from tests.helpers.commands import run_module
from tests.helpers.training import SMALL, make_place


def learning(*words: str) -> subprocess.CompletedProcess[str]:
    return run_module("benchmarks.learning", *words)


@pytest.mark.full
def test_settings_are_compared_within_a_seed(tmp_path: Path) -> None:
    place, out = make_place(tmp_path), tmp_path / "out"
    options = {"model": place.model, "data": place.data, "recipe": "demo", **SMALL}
    options |= {"max_steps": 6, "val_every": 3, "adjust_size": 0, "save_every": 0, "log_every": 1}
    words = ["--settings=LoRA,gaussian,none", "--seeds=1,2", "--jobs=2", f"--out={out}"]
    done = learning(*words, *(f"--{key}={value}" for key, value in options.items()))
    assert done.returncode == 0, done.stderr
    rows = {(r["setting"], r["seed"]): r for r in json.loads((out / "figures.json").read_text())}
    assert len(rows) == 6
    assert "violation" not in rows["LoRA", 1]
    assert rows["gaussian", 1]["violation"] < rows["none", 1]["violation"]
    assert rows["gaussian", 1]["loss 1/4"] == pytest.approx(rows["none", 1]["loss 1/4"], rel=1e-2)
    assert rows["gaussian", 1]["loss 1/4"] != rows["gaussian", 2]["loss 1/4"]
    again = learning(*words, *(f"--{key}={value}" for key, value in options.items()))
    assert "done" not in again.stdout and done.stdout.endswith(again.stdout), "nothing runs twice"


@pytest.mark.full
def test_rivals_are_compared_at_equal_budgets_on_records_that_none_has_seen(tmp_path: Path) -> None:
    place, out = make_place(tmp_path), tmp_path / "out"
    options = {"model": place.model, "data": place.data, "recipe": "demo", **SMALL, "init_batches": 1}
    options |= {"max_steps": 3, "val_every": 3, "save_every": 0, "match_params": "lora:4"}
    options |= {"adjust_start": 0, "adjust_freeze": 1, "adjust_interval": 1}
    words = ["--settings=LoRA,rivals", "--seeds=1", "--jobs=1", "--held_out=6", f"--out={out}"]
    done = learning(*words, *(f"--{key}={value}" for key, value in options.items()))
    assert done.returncode == 0, done.stderr
    rows = {row["setting"]: row for row in json.loads((out / "figures.json").read_text())}
    assert set(rows) == {"LoRA", *RIVALS}
    budget = rows["LoRA"]["mean parameters"]
    for setting, row in rows.items():
        assert 0.75 < row["mean parameters"] / budget < 1.25, setting
        assert row["further records"] > 0, setting


def test_a_run_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    done = learning("--model=/nowhere", "--settings=gaussian", "--seeds=7", f"--out={tmp_path}")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: {tmp_path}/gaussian-7 ended with 2: error: no training data at ")
    )


def test_an_unknown_setting_is_one_line(tmp_path: Path) -> None:
    done = learning("--model=/nowhere", "--settings=eta")
    assert done.returncode == 2 and "no 'eta'; there are LoRA, gaussian" in done.stderr
