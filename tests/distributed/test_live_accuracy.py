"""Accuracy while training: the figure of an evaluation of the adapter saved at that step, and the same training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from eval.__main__ import main as evaluate
from flexlora_ds import export
from tests.helpers import eval_tiny, training
from tests.helpers.processes import Processes
from tests.helpers.training import Place, losses, ranks, read_lines

ITEMS = 5
OPTIONS: dict[str, Any] = {"save_every": 6, "keep_checkpoints": 9, "weigh_directions": False, "lr": 0.03}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The base and records, and beside the records the eight tests."""
    place = training.make_place(tmp_path_factory.mktemp("live"))
    eval_tiny.write_data(place.root, 2 * ITEMS)
    return place


def run(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> str:
    """A training run that ends well; what process 0 printed."""
    given = place.arguments(out, stage, **OPTIONS, **options)
    results = processes.run(training.command, given, timeout=300)
    assert [result["code"] for result in results] == [0] * len(results), results[0]["stderr"]
    return str(results[0]["stdout"] + results[0]["stderr"])


def evaluated(place: Place, adapter: Path, out: Path, mode: str) -> dict[str, float]:
    """What `python -m eval` gives, by task."""
    words = [
        "--model",
        f"{place.model}",
        "--adapter",
        f"{adapter}",
        "--data",
        f"{place.root}",
        "--mode",
        mode,
    ]
    assert evaluate([*words, "--limit", str(ITEMS), "--out", f"{out}"]) == 0
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    return {name: task["accuracy"] for name, task in tasks.items()}


def require_figures_of_saved_adapters(place: Place, out: Path, mode: str, steps: list[int]) -> None:
    """Each row beside an evaluation of the adapter in the checkpoint of its step."""
    rows = read_lines(out / "accuracy.jsonl")
    assert [row["step"] for row in rows] == steps
    for row in rows:
        checkpoint = out / "checkpoints" / f"step_{row['step']:08d}"
        adapter = out / f"adapter-{row['step']}"
        words = ["--checkpoint", f"{checkpoint}", "--to", "peft", "--out", f"{adapter}"]
        assert export.main(words) == 0
        assert row["accuracy"] == evaluated(place, adapter, out / f"eval-{row['step']}", mode)
        assert row["average"] == pytest.approx(sum(row["accuracy"].values()) / 8)
        assert row["items"] == 8 * ITEMS and row["protocol"] == f"{mode} v1"


def test_the_figure_is_that_of_the_saved_adapter_and_training_is_as_without_it(
    place: Place, tmp_path: Path, one_process: Processes
) -> None:
    run(one_process, place, tmp_path / "without", 2)
    run(one_process, place, tmp_path / "with", 2, eval_every=12, eval_items=ITEMS)
    require_figures_of_saved_adapters(place, tmp_path / "with", "score", [12, 16])
    first, last = (row["accuracy"] for row in read_lines(tmp_path / "with" / "accuracy.jsonl"))
    assert first != last  # what is compared is the adapter's doing
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert ranks(tmp_path / "with") == ranks(tmp_path / "without")
    adapters = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("with", "without")
    ]
    assert all(adapters[0][key].equal(adapters[1][key]) for key in adapters[1])


@pytest.mark.full
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_two_processes_at_zero_3_and_through_a_resume(
    mode: str, place: Place, tmp_path: Path, two_processes: Processes
) -> None:
    out, options = tmp_path / "run", {"eval_every": 6, "eval_items": ITEMS, "eval_mode": mode}
    run(two_processes, place, tmp_path / "without", 3)
    run(two_processes, place, out, 3, **options)
    whole = [{**row, "seconds": 0} for row in read_lines(out / "accuracy.jsonl")]
    shutil.rmtree(out / "checkpoints" / "step_00000016")
    text = (out / "accuracy.jsonl").read_text().splitlines(keepends=True)
    assert "continuing after step 12" in run(two_processes, place, out, 3, **options)
    assert [{**row, "seconds": 0} for row in read_lines(out / "accuracy.jsonl")] == whole
    assert (out / "accuracy.jsonl").read_text().splitlines(keepends=True)[:2] == text[:2]
    require_figures_of_saved_adapters(place, out, mode, [6, 12, 16])
    assert losses(out) == losses(tmp_path / "without")


@pytest.mark.full
@pytest.mark.parametrize(("method", "packed"), [("lora", True), ("lora", False), ("adalora", True)])
def test_other_methods_packed_and_padded(
    method: str, packed: bool, place: Place, tmp_path: Path, one_process: Processes
) -> None:
    out = tmp_path / "run"
    run(one_process, place, out, 0, method=method, eval_every=16, eval_items=ITEMS, padding_free=packed)
    (row,) = read_lines(out / "accuracy.jsonl")
    assert row["accuracy"] == evaluated(place, out / "adapter", tmp_path / "eval", "score")


def test_tests_that_are_not_there_are_said_before_the_model_is_loaded(
    place: Place, tmp_path: Path, one_process: Processes
) -> None:
    shutil.copytree(place.root / "piqa", tmp_path / "tests" / "piqa")
    options = {"eval_every": 4, "eval_data": tmp_path / "tests", "eval_tasks": "piqa,boolq"}
    (result,) = one_process.run(training.command, place.arguments(tmp_path / "out", 0, **options))
    assert result["code"] == 2
    assert f"no test.json for boolq (eval_data {tmp_path}/tests)" in result["stderr"]
    assert "choose eval_tasks piqa" in result["stderr"] and not (tmp_path / "out").exists()
