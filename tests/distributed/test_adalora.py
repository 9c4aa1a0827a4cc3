"""PEFT's AdaLoRA under DeepSpeed is PEFT's AdaLoRA: losses, masks, averages and the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.report.run_data import read_run
from tests.helpers import training
from tests.helpers.adalora_reference import Reference, train_adalora
from tests.helpers.processes import Processes
from tests.helpers.training import Place, make_place

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, Any] = {"method": "adalora", "dropout": 0.0, "val_size": 0, "micro_batch_size": 2}
MATRICES = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("adalora"))


@pytest.fixture(scope="module")
def reference(place: Place) -> Reference:
    return train_adalora(place.arguments("unused", 0, **OPTIONS), TARGETS)


def run(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> Path:
    results = processes.run(training.command, place.arguments(out, stage, **{**OPTIONS, **options}))
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    return out


def require_like(out: Path, reference: Reference) -> None:
    """The run is the reference, up to rounding."""
    assert training.losses(out) == pytest.approx(reference.losses, rel=1e-4)
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == reference.tensors.keys()
    for name, value in reference.tensors.items():
        assert tensors[name].shape == value.shape, name
        assert torch.allclose(tensors[name], value, atol=1e-3), name


def test_it_is_pefts_own_and_its_ranks_move(
    place: Place, reference: Reference, one_process: Processes, tmp_path: Path
) -> None:
    out = run(one_process, place, tmp_path / "run", 0)
    require_like(out, reference)
    rows = training.read_lines(out / "ranks.jsonl")
    assert [row["total_rank"] for row in rows] == sorted((row["total_rank"] for row in rows), reverse=True)
    assert rows[-1]["total_rank"] == training.SMALL["rank"] * MATRICES < rows[0]["total_rank"]
    assert len(set(rows[-1]["ranks"].values())) > 1, "the budget went to some more than to others"
    last = reference.ranks[-1]
    assert rows[-1]["ranks"] == {name.partition(".lora_E")[0]: rank for name, rank in last.items()}
    _, history = read_run(out).rank_history()
    assert {ranks[0] for ranks in history.values()} == {6}, "all begin with 1.5 · rank"


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_stage_makes_another_of_it(
    stage: int, place: Place, reference: Reference, two_processes: Processes, tmp_path: Path
) -> None:
    """ZeRO-2 and 3 hold no whole gradient, and 1 to 3 update masters, not what the model computes with."""
    require_like(run(two_processes, place, tmp_path / "run", stage), reference)


def test_a_calendar_without_a_step_between_is_refused(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    asked = {**OPTIONS, "adjust_start": 12, "adjust_freeze": 4}
    (result,) = one_process.run(training.command, place.arguments(tmp_path / "run", 0, **asked))
    assert result["code"] == 2
    assert "AdaLoRA's budget falls between its start at step 12 and its freeze at step 12" in result["stderr"]
    assert not (tmp_path / "run").exists(), "before anything is built"
