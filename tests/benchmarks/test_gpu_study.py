"""The GPU benchmark's study on a CPU: runs of several methods over seeds, and what is said where some fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import study
from benchmarks.gpu.section import Conditions, Report
from benchmarks.learning import runs
from benchmarks.learning.runs import Run, Runner
from benchmarks.learning.settings import SETTINGS
from flexlora_ds.errors import RunError
from tests.helpers import training
from tests.helpers.processes import Processes

BROKEN = "gaussian"
"""A setting whose run on seed 1 fails."""


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    place = training.make_place(tmp_path)
    return Conditions("tiny", 60.0, tiny=True, model=str(place.model), data=str(place.data))


@pytest.fixture
def in_one_process(one_process: Processes, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs share a process that stays, which spares each the start of a Python with torch; the words of all runs."""
    one_process.run("os:getpid")  # it ends with the thread that started it: not one of the study's
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1] == "launch/train.py"
        seen.append(command[2:])
        if any(word.endswith(f"/{BROKEN}-1") for word in command):
            return subprocess.CompletedProcess(command, 1, "and then\nerror: no room")
        (result,) = one_process.run(training.command, command[2:])
        return subprocess.CompletedProcess(command, result["code"], result["stdout"] + result["stderr"])

    monkeypatch.setattr(runs.subprocess, "run", run)
    return seen


def rows_of(conditions: Conditions, folder: Path) -> list[dict[str, Any]]:
    study.run(conditions, Report("study", folder / "figures"))
    return [json.loads(line) for line in (folder / "figures").read_text().splitlines()]


def test_methods_are_compared_seed_by_seed(
    conditions: Conditions,
    in_one_process: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {row["name"]: row for row in rows_of(conditions, tmp_path)}
    assert len(in_one_process) == 4 and not [name for name, row in rows.items() if row.get("absent")]
    lora, market = (rows[f"{name}: last validation loss"] for name in study.SETTINGS_TINY)
    gap = rows["alloc-growth minus LoRA, with 95 % of resampled seeds"]
    assert gap["each"] == pytest.approx([a - b for a, b in zip(market["each"], lora["each"], strict=True)])
    assert gap["low"] <= gap["mean"] <= gap["high"] and f"{gap['mean']:+.4f} (" in gap["value"]
    shown = capsys.readouterr().out
    assert "minus LoRA, by seed" in shown and f"{gap['mean']:+.4f} ({gap['low']:+.4f} to" in shown


def test_a_method_that_fails_is_named_and_the_others_are_compared(
    conditions: Conditions, in_one_process: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "SETTINGS_TINY", ("LoRA", BROKEN))
    monkeypatch.setattr(study, "SEEDS_TINY", (1,))
    rows = rows_of(conditions, tmp_path)
    absent = {row["name"]: row["reason"] for row in rows if row.get("absent")}
    assert (
        list(absent) == [f"{BROKEN}, seed 1"]
        and "ended with 1: error: no room" in absent[f"{BROKEN}, seed 1"]
    )
    assert [row["name"] for row in rows if "last validation" in row["name"]] == ["LoRA: last validation loss"]


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    assert {*study.SETTINGS, *study.SETTINGS_TINY} <= set(SETTINGS)
    (row,) = rows_of(Conditions("tiny", 60.0, tiny=True), tmp_path)
    assert row["absent"] and "--model MODEL --data RECORDS" in row["reason"]


def test_a_seed_that_would_not_fit_is_not_begun_and_a_run_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = study.Study(Conditions("tiny", 0.0), Report("study", tmp_path / "figures"), tmp_path, ())
    monkeypatch.setattr(study.Study, "train_seed", lambda self, settings, seed: (set(), 30.0))
    assert late.train(["LoRA"], [1, 2]) == (["LoRA"], [1])
    assert "no time left" in json.loads((tmp_path / "figures").read_text())["reason"]

    def slow(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(runs.subprocess, "run", slow)
    with pytest.raises(RunError, match="LoRA-1 was ended after 7 s"):
        Runner(tmp_path, seconds=7.0).train(Run("LoRA", 1))
