"""Measurements that a stop or a fault ends; equal numbers of forward passes however unequal the work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eval.predictions import Prediction
from flexlora_ds.errors import RunError
from launch.loop.accuracy import AccuracyLog
from launch.loop.lockstep import Lockstep
from launch.report.build import build_report
from launch.run_folder.folder import RunFolder
from tests.helpers.processes import ROOT, Processes
from tests.helpers.written_run import begin_run, write_steps


def test_a_task_is_an_option_as_soon_as_it_is_defined() -> None:
    """As docs/data.md adds one: a definition is all."""
    program = """
from data_prep.tasks import TASKS
TASKS["sciq"] = TASKS["boolq"]
from launch.options.train_options import parse_options
print(*parse_options(["--eval_tasks=sciq,piqa"]).eval_tasks)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["sciq", "piqa"], ended.stderr


class Engine(nn.Module):
    """A model that counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)
        self.calls = 0

    def forward(self, **arguments: Any) -> None:
        self.calls += 1

    def zero_optimization_partition_weights(self) -> bool:
        return False


def log_of(folder: RunFolder, answer: Callable[[int], list[Prediction]], stop: bool = False) -> Any:
    """An accuracy log of three batches, and the warnings that it gives."""
    answerer = SimpleNamespace(answer=answer, default_tokens=lambda: 512)
    items = SimpleNamespace(items=range(4))
    test: Any = SimpleNamespace(
        tasks={"boolq": items},
        protocol=SimpleNamespace(label="score v1"),
        batches=lambda answerer, budget: [0, 1, 2],
        accuracies=lambda correct: {"boolq": correct["boolq"] / 4},
    )
    process: Any = SimpleNamespace(world_size=1, rank=0, is_rank_zero=True, device=torch.device("cpu"))
    warned: list[str] = []
    log: Any = AccuracyLog(
        Engine(),
        process,
        folder,
        test,
        lambda: stop,
        warned.append,
        every=5,
        last=12,
        most_tokens=64,  # type: ignore[arg-type]
    )
    log._measure = lambda test, step: log._answer(test, answerer, step)
    log._sum = lambda test, correct: correct
    return log, warned


def predictions(batch: int) -> list[Prediction]:
    """Right in the first batch, wrong in the others."""
    return [Prediction("boolq", batch, "", "", "true", "true" if batch == 0 else "false")]


def test_measured_at_every_interval_and_after_the_last_step(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run")
    log, warned = log_of(folder, predictions)
    for step in range(1, 13):
        log.after_step(step)
    rows = folder.accuracy.read()
    assert [row["step"] for row in rows] == [5, 10, 12] and not warned
    assert all(row["accuracy"] == {"boolq": 0.25} and row["average"] == 0.25 for row in rows)
    write_steps(folder, 1, 12)
    page = build_report(folder.path).read_text()
    assert "Accuracy while training" in page and "25.0%" in page


def test_a_fault_is_a_warning_and_a_stop_nothing_at_all(tmp_path: Path) -> None:
    def broken(batch: int) -> list[Prediction]:
        raise RunError("the model's numbers are not finite", "boolq, item 3")

    folder = begin_run(tmp_path / "run")
    log, warned = log_of(folder, broken)
    log.after_step(5)
    assert warned == [
        "step 5: the accuracy was not measured: the model's numbers are not finite (boolq, item 3)"
    ]
    log, warned = log_of(folder, predictions, stop=True)
    log.after_step(5)
    assert not warned and folder.accuracy.read() == []


def unequal_work(passes: list[int]) -> int:
    """How often a process's model is called, of which each has another number of passes to make."""
    from launch.distributed.process import join_processes

    process: Any = join_processes(None)
    engine: Any = Engine()
    step = Lockstep(engine, process, needed=True)
    for _ in range(2):
        for _ in range(passes[process.rank]):
            step(input_ids=torch.zeros(1, 1))
        step.finish()
    return int(engine.calls)


@pytest.mark.parametrize("passes", [[3, 1], [0, 2]])
def test_all_processes_make_as_many_passes_as_the_busiest(
    passes: list[int], two_processes: Processes
) -> None:
    assert two_processes.run(unequal_work, passes) == [2 * max(passes)] * 2
