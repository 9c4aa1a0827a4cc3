"""A run that is asked to stop, at any moment: one complete checkpoint, exit code 0, and the rest is the same run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexlora_ds.checkpoint import files
from tests.helpers import training
from tests.helpers.launched import Launched, held, launched, lines
from tests.helpers.nursery import Nursery
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import (
    assert_same_run,
    run_training,
    saving_arguments,
    uninterrupted_run,
    untimed_rows,
)
from tests.helpers.training import Place

STOP_SECONDS = 60  # the promise


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory, two_processes: Processes) -> Path:
    """The run that nothing disturbed."""
    return uninterrupted_run({}, place, tmp_path_factory.mktemp("whole"), two_processes, "zero2")


def words(place: Place, out: Path, **options: Any) -> list[str]:
    return saving_arguments(place, out, "zero2", save_every=3, **options)


def assert_stopped(out: Path, done: int | None = None) -> int:
    """The run says so, and its newest checkpoint is of the last step done; that step."""
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "stopped"
    steps = int(summary["steps"])
    assert done is None or steps == done
    found = files.checkpoints_in(out / "checkpoints")
    assert [files.step_of(p) for p in found[:1]] == ([steps] if steps else [])
    assert not list((out / "checkpoints").glob(".step_*"))
    for folder in found:
        files.verify(folder)
    return steps


MOMENTS = [
    (signal.SIGTERM, [1], "step 6", 1, 6),
    (signal.SIGUSR1, [0, 1], "step 6", 0, 6),
    (signal.SIGTERM, [0], "validation 4", 1, 4),
    (signal.SIGUSR1, [1], "validation 4", 1, 4),
    (signal.SIGTERM, [0, 1], "save 3", 0, None),
    (signal.SIGUSR1, [1], "save 3", 1, None),
    (signal.SIGTERM, [1], "rank change 8", 0, 8),
    (signal.SIGUSR1, [0], "rank change 8", 1, 8),
    (signal.SIGTERM, [0, 1], "start-up", 1, 0),
    (signal.SIGUSR1, [1], "start-up", 0, 0),
]
IN_SHORT = MOMENTS[3], MOMENTS[6]


@pytest.mark.parametrize(
    ("number", "ranks", "moment", "holder", "done"),
    [case if case in IN_SHORT else pytest.param(*case, marks=pytest.mark.full) for case in MOMENTS],
)
@pytest.mark.complaint("Lightning 20542", "NeMo Automodel 3007")
def test_a_stopped_run_continues_as_if_it_had_not_been(
    number: signal.Signals,
    ranks: list[int],
    moment: str,
    holder: int,
    done: int | None,
    place: Place,
    whole: Path,
    tmp_path: Path,
    two_processes: Processes,
    nursery: Nursery,
) -> None:
    """The signal is noted while the process `holder` is inside the moment, and the others wait for it."""
    out = tmp_path / "run"
    with held(nursery, words(place, out), 2, moment, holder, tmp_path / "notes") as started:
        started.signal(number, *ranks)
        started.let_go()
        assert started.run.wait(STOP_SECONDS) == [0, 0], started.run.said()
        said = started.run.said()
    assert "signals: ready" in said and "stopping after step" in said
    steps = assert_stopped(out, done)
    assert steps < training.STEPS
    run_training(two_processes, words(place, out))
    if moment.startswith("rank change"):
        _fill_in_losses(out, whole, steps)
    assert json.loads((out / "summary.json").read_text())["state"] == "finished"
    assert_same_run(out, whole)


def _fill_in_losses(out: Path, whole: Path, step: int) -> None:
    """The one thing that a stop costs: the validations around the rank change that it fell into."""
    mine = training.read_lines(out / "ranks.jsonl")
    (broken,) = (row for row in mine if row["step"] == step)
    (theirs,) = (row for row in training.read_lines(whole / "ranks.jsonl") if row["step"] == step)
    assert broken["loss_after"] is None
    broken |= {key: theirs[key] for key in ("loss_before", "loss_after", "warnings")}
    (out / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))


@pytest.mark.full
def test_a_stop_in_the_validation_of_a_rank_change(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    """The change comes all the same, and the validation behind it when the run goes on."""
    out = tmp_path / "run"
    with held(nursery, words(place, out), 2, "validation 8", 0, tmp_path / "notes") as started:
        started.signal(signal.SIGTERM, 0)
        started.let_go()
        assert started.run.wait(STOP_SECONDS) == [0, 0], started.run.said()
    steps = assert_stopped(out, 8)
    assert untimed_rows(out, "ranks.jsonl")[-1]["loss_before"] is None
    run_training(two_processes, words(place, out))
    _fill_in_losses(out, whole, steps)
    assert_same_run(out, whole)


def test_a_second_signal_ends_at_once(place: Place, tmp_path: Path, nursery: Nursery) -> None:
    """While the model is still to be built, so that the first cannot have been acted on yet."""
    with held(nursery, words(place, tmp_path / "run"), 1, "start-up", 0, tmp_path / "notes") as started:
        started.signal(signal.SIGTERM)
        # The second counts once 0.3 s have passed since the first, which the process has noted by now.
        started.run.wait_for(lambda: _sent_again(started.run))
        assert started.run.wait(20) == [128 + signal.SIGTERM]
    assert not (tmp_path / "run" / "summary.json").exists()


def _sent_again(run: Launched) -> bool:
    run.send(signal.SIGTERM)
    return run.processes[0].poll() is not None


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, 'launch/train.py', *sys.argv[1:]])"


@pytest.mark.full
def test_an_orphan_stops_as_on_a_signal(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # The process looks for its launcher once a second: the run must last longer.
    with launched([LAUNCHER, *words(place, out, max_steps=1000)], 1, script="-c") as started:
        started.wait_for(lambda: lines(out / "metrics.jsonl") >= 4)
        started.send(signal.SIGKILL)
        _wait_for_summary(started, out)
        assert "the launcher is gone" in started.said()
    assert_stopped(out)


def test_the_launchers_upper_process_may_be_killed_alone(place: Place, tmp_path: Path) -> None:
    """`deepspeed` is two processes: the lower one lives on as an orphan, and with it the training processes."""
    out = tmp_path / "run"
    port = 20_000 + os.getpid() % 20_000
    command = ["deepspeed.launcher.runner", f"--master_port={port}", "launch/train.py"]
    with launched([*command, *words(place, out, max_steps=400)], 1, script="-m") as started:
        started.wait_for(lambda: lines(out / "metrics.jsonl") >= 2)
        (lower,) = psutil.Process(started.processes[0].pid).children()
        started.send(signal.SIGKILL)
        _wait_for_summary(started, out)
        assert "the launcher is gone" in started.said()
        assert lower.wait(STOP_SECONDS) in (0, None)
    assert 0 < assert_stopped(out) < 400


def _wait_for_summary(started: Launched, out: Path) -> None:
    """The process that was started is gone; those that it started are to end by themselves."""
    started.wait_for((out / "summary.json").exists, timeout=STOP_SECONDS, orphans=True)
