"""Before the first step the largest micro-batch is tried; the run that follows is the one without it, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import startup_worker as worker
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import final_state, untimed_rows
from tests.helpers.training import Place, make_place

FEW: dict[str, Any] = {
    "max_steps": 4,
    "adjust_start": 0,
    "adjust_freeze": 1,
    "adjust_interval": 1,
    "micro_batch_size": 2,
    "save_every": 2,
    "weigh_directions": False,
    "val_size": 0,
    "keep_checkpoints": 9,
}
PADDED = {"padding_free": False}
GRADIENT = {"new_direction": "gradient", "importance": "growth"}
"""The first step's gradients are collected already."""
full = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


def require_equal(out: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert untimed_rows(out, name) == untimed_rows(other, name)
    state, expected = final_state(out, FEW["max_steps"]), final_state(other, FEW["max_steps"])
    assert state.keys() == expected.keys() and len(state) > 10
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def run(processes: Processes, arguments: list[str]) -> str:
    results = processes.run(worker.without_report, arguments)
    for result in results:
        assert result["code"] == 0, result["stderr"]
    return str(results[0]["stderr"])


def check(processes: Processes, place: Place, out: Path, stage: int, options: dict[str, Any]) -> None:
    """With the check and without it."""
    run(processes, place.arguments(out / "without", stage, **FEW, **options))
    said = run(processes, place.arguments(out / "tried", stage, **FEW, **options, memory_check=True))
    assert "memory check: the largest micro-batch, 2 records in " in said
    require_equal(out / "tried", out / "without")


def check_resumed(processes: Processes, place: Place, out: Path, stage: int, options: dict[str, Any]) -> None:
    """From the middle of a run with the check, and that run without it."""
    run(processes, place.arguments(out / "without", stage, **FEW, **options))
    middle = out / "without" / "checkpoints" / "step_00000002"
    again = place.arguments(out / "again", stage, **FEW, **options, memory_check=True, resume=middle)
    assert "memory check: " in run(processes, again)
    state, expected = (final_state(out / name, FEW["max_steps"]) for name in ("again", "without"))
    assert len(state) > 10 and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"method": "lora", **PADDED}),
        (3, {**GRADIENT, "gradient_checkpointing": True}),
        pytest.param(0, {**GRADIENT, "gradient_checkpointing": True}, marks=full),
        pytest.param(1, {"dtype": "bf16"}, marks=full),
        pytest.param(2, {"method": "adalora"}, marks=full),
        pytest.param(3, {"method": "full", "lr": 1e-4}, marks=full),
        pytest.param(2, {"orth_form": "norm"}, marks=full),
        pytest.param(3, {**GRADIENT, "init": "gradient"}, marks=full),
        pytest.param(3, {"method": "lora", "gradient_checkpointing": True}, marks=full),
        pytest.param(3, {"dtype": "bf16", "ds": "ds_configs/zero3_offload.json", **PADDED}, marks=full),
    ],
    ids=str,
)
def test_one_process(
    one_process: Processes, place: Place, tmp_path: Path, stage: int, options: dict[str, Any]
) -> None:
    check(one_process, place, tmp_path, stage, options)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        pytest.param(3, {}, marks=full),
        pytest.param(0, {"method": "lora"}, marks=full),
        pytest.param(2, {"dtype": "bf16", **GRADIENT}, marks=full),
        pytest.param(3, {"gradient_checkpointing": True, **PADDED}, marks=full),
    ],
    ids=str,
)
def test_two_processes(
    two_processes: Processes, place: Place, tmp_path: Path, stage: int, options: dict[str, Any]
) -> None:
    check(two_processes, place, tmp_path, stage, options)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_a_trial_leaves_nothing_in_the_engine(two_processes: Processes, stage: int, dtype: str) -> None:
    for found in two_processes.run(worker.after_a_trial, stage, dtype):
        expected = {"gradients": 0, "gathered": 0, "hooks": 0, "counts": [0, 0, 0], "same loss": True}
        assert found == expected


@pytest.mark.parametrize(
    ("stage", "options"),
    [pytest.param(0, {"method": "lora"}, marks=full), pytest.param(3, GRADIENT, marks=full)],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(
    one_process: Processes, place: Place, tmp_path: Path, stage: int, options: dict[str, Any]
) -> None:
    check_resumed(one_process, place, tmp_path, stage, options)


def test_too_little_memory_ends_the_run_before_its_first_step(
    one_process: Processes, place: Place, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "run", memory_check=True, micro_batch_size=4)
    (result,) = one_process.run(worker.without_memory, arguments, [0])
    assert result["code"] == 2, result["stderr"]
    (line,) = [line for line in result["stderr"].splitlines() if line.startswith("error:")]
    assert "too little memory for the run's largest micro-batch, 4 records in " in line
    assert "set micro_batch_size 2" in line and "or set gradient_checkpointing true" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_does_not_fit_one_process_ends_all(
    two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    options = {"memory_check": True, "micro_batch_size": 1, "gradient_checkpointing": True}
    arguments = place.arguments(tmp_path / "run", 2, **options)
    results = two_processes.run(worker.without_memory, arguments, [1])
    assert [result["code"] for result in results] == [2, 2], results
    assert "ds_configs/zero3.json; or lower cutoff_len, now 200" in results[0]["stderr"]
    assert "error:" not in results[1]["stderr"]
