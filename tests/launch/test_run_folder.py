"""The run folder's files: valid, complete, continued by a resume without gaps or duplicates."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexlora_ds.checkpoint.files import keep_newest
from flexlora_ds.errors import RunError, UserError
from launch.options.train_options import TrainOptions
from launch.run_folder.claim import claim_run_folder
from launch.run_folder.folder import RunFolder, StepMetrics, Summary, trainable_params_mean
from launch.run_folder.json_files import JsonLines, to_json
from launch.run_folder.lock import one_run_in
from launch.run_folder.rows import RANK_CHANGE
from tests.helpers.checkpoint_samples import flip_byte, save_checkpoint
from tests.helpers.moved_folders import MOVES


def step_metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "epoch": step / 10,
        "loss": 1.5,
        "orth": 0.01,
        "lr": 3e-4,
        "grad_norm": 0.7,
        "tokens": 1600,
        "tokens_per_s": 800.0,
        "step_s": 2.0,
        "peak_mem_gb": 1.25,
        "total_rank": 240,
    }
    return StepMetrics(**(values | changes))


def rank_change(step: int, trainable: int = 1000) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(RANK_CHANGE, 0)
    for key in ("pruned", "expanded", "prune_age"):
        values[key] = []
    return values | {"importance": {}, "ranks": {}, "step": step, "trainable_params": trainable}


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "state": "finished",
        "steps": 40,
        "final_loss": 0.2,
        "wall_seconds": 61.5,
        "tokens": 64_000,
        "tokens_per_s": 1040.0,
        "peak_mem_gb": 1.25,
        "trainable_params_final": 990,
        "trainable_params_mean": 995.5,
        "rank_changes": 4,
    }
    return Summary(**(values | changes))


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "demo")
    run.prepare("auto")
    return run


def test_the_contracts_files_and_keys(folder: RunFolder) -> None:
    folder.write_options("model: tiny\nmax_steps: null\n")
    folder.log_step(step_metrics(10))
    folder.log_validation(10, 1.25)
    folder.log_rank_change({"warnings": ["jump"]} | rank_change(10))
    folder.write_summary(summary(warnings=["collapse"]))
    folder.write_spectra({"model.layers.0.q_proj": [0.5, -0.25]})
    assert (folder.path / "options.yaml").read_text() == "model: tiny\nmax_steps: null\n"
    (metrics,) = strict_lines(folder.path / "metrics.jsonl")
    contract = "step epoch loss orth lr grad_norm tokens tokens_per_s step_s peak_mem_gb total_rank skipped"
    assert list(metrics) == contract.split()
    assert strict_lines(folder.path / "validation.jsonl") == [{"step": 10, "loss": 1.25}]
    assert list(strict_lines(folder.path / "ranks.jsonl")[0]) == [*RANK_CHANGE, "warnings"]
    written = json.loads((folder.path / "summary.json").read_text())
    assert written["trainable_params"] == {"final": 990, "mean": 995.5}
    assert set(written["versions"]) == {"python", "flexlora", "torch", "deepspeed", "transformers", "peft"}
    assert written["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert written["warnings"] == ["collapse"]
    assert json.loads((folder.path / "spectra.json").read_text()) == {"model.layers.0.q_proj": [0.5, -0.25]}
    assert not list(folder.path.glob(".*"))


def test_numbers_that_are_not_finite_become_null(folder: RunFolder) -> None:
    folder.log_step(step_metrics(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    (row,) = strict_lines(folder.path / "metrics.jsonl")
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, True)


def test_tensors_and_arrays_become_numbers() -> None:
    value = {
        "a": torch.tensor(2),
        "b": np.float32(0.5),
        "c": (torch.tensor([1.0, math.nan]),),
        "d": Path("x"),
    }
    assert json.loads(to_json(value)) == {"a": 2, "b": 0.5, "c": [[1.0, None]], "d": "x"}


def test_a_resume_leaves_no_gaps_and_no_duplicates(folder: RunFolder) -> None:
    for step in range(1, 31):
        folder.log_step(step_metrics(step))
        if step % 10 == 0:
            folder.log_validation(step, 1.0)
            folder.log_rank_change(rank_change(step))
    claim_run_folder(folder.path)
    again = RunFolder(folder.path)
    again.prepare("auto")
    again.continue_after(20)
    for step in range(21, 41):
        again.log_step(step_metrics(step))
    assert [row["step"] for row in again.metrics.read()] == list(range(1, 41))
    assert [row["step"] for row in again.rank_changes.read()] == [10, 20]
    assert [row["step"] for row in again.validation.read()] == [10, 20]


def test_a_torn_last_line_is_forgotten(folder: RunFolder) -> None:
    folder.log_step(step_metrics(1))
    folder.log_step(step_metrics(2))
    path = folder.metrics.path
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in folder.metrics.read()] == [1]
    folder.continue_after(7)
    folder.log_step(step_metrics(2))
    assert [row["step"] for row in strict_lines(path)] == [1, 2]


BAD_LINES = {
    "torn": "{torn",
    "a list": "[1]",
    "no step": '{"loss": 1}',
    "empty": "",
    "deep": "[" * 100_000,
    "digits": '{"step": ' + "1" * 5000 + "}",
    "latin-1": '{"step": "\xe9"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_damaged_line_is_named(folder: RunFolder, line: str) -> None:
    folder.log_step(step_metrics(1))
    folder.metrics.path.write_bytes(folder.metrics.path.read_bytes() + line.encode("latin-1") + b"\n")
    folder.log_step(step_metrics(3))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2") as caught:
        folder.metrics.read()
    assert len(str(caught.value)) < 400


def test_steps_that_go_back_are_named(folder: RunFolder) -> None:
    """A log that was written twice, or put together by hand; two rows of one step are as a validation writes them."""
    for step in (1, 2, 2, 5):
        folder.log_step(step_metrics(step))
    assert [row["step"] for row in folder.metrics.read()] == [1, 2, 2, 5]
    folder.metrics.path.write_bytes(2 * folder.metrics.path.read_bytes())
    with pytest.raises(
        RunError, match=r"not a row of a run: step 1 behind step 5 \(.*metrics\.jsonl, line 5\)"
    ):
        folder.metrics.read()


@pytest.mark.parametrize("value", ["1", True, -1, 1.5, None, [1], {}, 10**400])
def test_a_value_of_another_type_is_named(folder: RunFolder, value: Any) -> None:
    for name, wrong in (("step", value), ("tokens", value), ("skipped", 0), ("loss", "1"), ("lr", [1.0])):
        folder.metrics.path.write_text(json.dumps(asdict(step_metrics(1)) | {name: wrong}) + "\n")
        with pytest.raises(RunError, match=rf"{name} has a value that no run writes .*, line 1"):
            folder.metrics.read()


def test_a_pipe_in_a_logs_place_is_refused_by_readers_and_writers(folder: RunFolder) -> None:
    os.mkfifo(folder.metrics.path)
    with pytest.raises(UserError, match=r"not an ordinary file \(.*metrics\.jsonl"):
        folder.metrics.read()
    folder.log_step(step_metrics(1))
    with pytest.raises(RunError, match=r"cannot write: No such device or address \(.*metrics\.jsonl"):
        folder.raise_fault()


def test_the_rows_up_to_a_checkpoint_are_compared_byte_by_byte(folder: RunFolder) -> None:
    for step in range(1, 8):
        folder.log_step(step_metrics(step))
    lines, path = folder.metrics, folder.metrics.path
    seal, whole = lines.seal(), path.read_bytes()
    assert seal == {"rows": 7, "sha256": hashlib.sha256(whole).hexdigest()}
    folder.log_step(step_metrics(8))
    lines.require(seal, "restore it")
    for position in range(0, len(whole), 41):
        flip_byte(position)(path)
        with pytest.raises(
            RunError, match=r"the log (has lost rows|was changed).*metrics\.jsonl.*restore it"
        ):
            lines.require(seal, "restore it")
        flip_byte(position)(path)
    for kept in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(RunError, match=r"has lost rows: . are left of the 7"):
            lines.require(seal, "restore it")
    path.unlink()
    with pytest.raises(RunError, match="has lost rows: 0 are left"):
        lines.require(seal, "restore it")
    path.write_bytes(whole.replace(b"\n", b"\n\n", 3))
    with pytest.raises(RunError, match=r"was changed.*metrics\.jsonl, line 2\)"):
        lines.require(seal, "restore it")


def test_the_count_goes_on_after_a_resume(folder: RunFolder) -> None:
    for step in range(1, 10):
        folder.log_step(step_metrics(step))
    again = RunFolder(folder.path)
    again.continue_after(4)
    again.log_step(step_metrics(5))
    content = again.metrics.path.read_bytes()
    assert again.seals()["metrics.jsonl"] == {"rows": 5, "sha256": hashlib.sha256(content).hexdigest()}
    again.start_anew()
    assert again.seals()["metrics.jsonl"] == {"rows": 0, "sha256": hashlib.sha256().hexdigest()}


def test_a_run_that_never_saved_starts_anew(folder: RunFolder) -> None:
    folder.log_step(step_metrics(3))
    folder.write_summary(summary())
    (folder.path / "eval_before").mkdir()
    folder.start_anew()
    assert sorted(path.name for path in folder.path.iterdir()) == ["eval_before"]


def test_resume_none_refuses_a_folder_that_holds_anything(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").prepare("none")
    RunFolder(tmp_path / "new").prepare("none")  # still empty
    (tmp_path / "new" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path / "new").prepare("none")
    RunFolder(tmp_path / "new").prepare("auto")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "adapter", "report"])
def test_what_no_run_wrote_is_not_written_over(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    if "." not in name:
        mine.mkdir()
        mine = mine / "mine"
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"the folder holds {name}, which no run of ours wrote"):
        RunFolder(tmp_path).prepare("auto")
    assert mine.read_text() == "mine"
    (tmp_path / "options.yaml").write_text(TrainOptions().to_yaml())  # as runs before the marker left it
    RunFolder(tmp_path).prepare("auto")


def test_a_folder_of_checkpoints_that_are_not_ours_can_hold_a_run(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "epoch-1.pt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run = RunFolder(tmp_path)
    run.prepare("auto")
    save_checkpoint(run.checkpoints, 3)
    keep_newest(run.checkpoints, 1)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_folder_that_is_another_now_gets_no_more_lines(
    folder: RunFolder, move: Callable[[Path], object]
) -> None:
    with one_run_in(folder.path) as folder.require_present:
        folder.log_step(step_metrics(1))
        folder.raise_fault()
        move(folder.path)
        folder.log_step(step_metrics(2))
        for ask in (folder.raise_fault, folder.sync, lambda: folder.write_summary(summary())):
            with pytest.raises(RunError, match="the run folder was moved, removed or replaced"):
                ask()
    left = [path for path in (folder.path, folder.path.with_name("moved")) if path.exists()]
    assert all([row["step"] for row in RunFolder(path).metrics.read()] == [1] for path in left)
    assert not any((path / "summary.json").exists() for path in left)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no-such-run")):
        with pytest.raises(UserError, match="cannot write to the run folder") as caught:
            RunFolder(place).prepare("auto")
        assert "\n" not in str(caught.value)


def test_checkpoints_that_could_not_be_written_are_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="cannot write to the run folder: Not a directory"):
        RunFolder(tmp_path).prepare("auto")


def test_a_log_that_lacks_a_line_is_reported_and_gets_no_more(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    run.log_step(step_metrics(1))
    (tmp_path / "metrics.jsonl").rmdir()
    run.log_step(step_metrics(2))
    assert not (tmp_path / "metrics.jsonl").exists(), "a line after one that is missing would be a gap"
    for ask in (run.raise_fault, run.sync):
        with pytest.raises(RunError, match=r"metrics\.jsonl"):
            ask()


def test_only_process_0_writes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", is_rank_zero=False)
    run.prepare("none")
    run.write_options("{}")
    run.log_step(step_metrics(1))
    run.log_validation(1, 1.0)
    run.log_rank_change(rank_change(1))
    run.write_summary(summary())
    run.write_spectra({})
    run.continue_after(0)
    run.start_anew()
    assert not run.path.exists()


def test_a_full_disk_while_logging_is_one_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(RunError, match=r"No space left on device \(/dev/full\)"):
        JsonLines(full).append({"step": 1})


def test_the_mean_of_trainable_parameters_weighs_by_steps() -> None:
    changes = [rank_change(10, 200), rank_change(30, 50)]
    by_step = [100] * 10 + [200] * 20 + [50] * 10
    assert trainable_params_mean(100, changes, 40) == sum(by_step) / 40
    assert trainable_params_mean(100, [], 40) == 100
    assert trainable_params_mean(100, [], 0) == 100
