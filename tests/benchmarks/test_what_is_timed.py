"""The benchmarks that open a run measure what the training command does: the same decisions, the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import same_loss, saving_cost
from launch import train
from launch.distributed import agreement, process
from launch.distributed.process import Process
from launch.engine import build
from launch.engine.settled import Settled
from launch.loop import session
from launch.options.train_options import TrainOptions, parse_options
from tests.helpers import training
from tests.helpers.processes import ROOT

WATCHER = SimpleNamespace(follow=lambda *given: None, say_ready=lambda process: None)


class ReachedError(Exception):
    """The moment at which a run has decided everything and builds its engine."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `begin` or `build_engine` was given, run by run; neither builds anything."""
    seen: list[Any] = []

    def stop(settled: Settled, *others: Any) -> None:
        seen.append((settled, next((other for other in others if hasattr(other, "train")), None)))
        raise ReachedError

    alone = Process(rank=0, world_size=1, device=torch.device("cpu"), threads=1)
    monkeypatch.setattr(agreement, "gather", lambda process, value: [value])
    for module in (train, process):
        monkeypatch.setattr(module, "join_processes", lambda *timeout: alone)
    for module, name in ((train, "begin"), (session, "begin"), (build, "build_engine")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.chdir(ROOT)
    return seen


BENCHMARKS: dict[str, Callable[[TrainOptions], Any]] = {
    "saving_cost": lambda options: saving_cost.body(options, 2, 2, WATCHER),  # type: ignore[arg-type]
    "same_loss": lambda options: same_loss.losses_of(options, plain=False),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_opens_the_run_that_the_command_opens(
    tmp_path: Path, reached: list[Any], name: str
) -> None:
    place = training.make_place(tmp_path)
    options = parse_options(place.arguments(tmp_path / "out"))
    with pytest.raises(ReachedError):
        train.train(options, WATCHER)  # type: ignore[arg-type]
    with pytest.raises(ReachedError):
        BENCHMARKS[name](options)
    (run, batches), (measured, others) = reached
    assert measured == run
    assert run.computation.packed is not torch.cuda.is_available(), "a CPU's sdpa packs"
    if others is not None:
        first, second = (next(iter(data.train.micro_batches(1))) for data in (batches, others))
        assert first.segment_lengths == second.segment_lengths
        assert torch.equal(first.input_ids, second.input_ids)
