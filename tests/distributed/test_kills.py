"""A run that is killed, whole or in part, at any moment: the next start goes on, and the rest is the same run."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
from pathlib import Path

import pytest

from tests.helpers import training
from tests.helpers.launched import held, launched, lines
from tests.helpers.nursery import Nursery
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import assert_same_run, run_training, saving_arguments, uninterrupted_run
from tests.helpers.training import Place

NOTICE_SECONDS = 60  # the promise
LONG = {"max_steps": 40, "save_every": 5}
"""Rank changes after 5, 8, …, 35; dropout 0.2; two processes with two micro-steps each."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


def kill_at(nursery: Nursery, moment: str, rank: int, words: list[str], notes: Path) -> str:
    """Start the run, kill all of its processes at a moment; what process 0 had said."""
    with held(nursery, words, 2, moment, rank, notes) as started:
        started.run.send(signal.SIGKILL)
        assert started.run.wait() == [-signal.SIGKILL] * 2
        return started.run.said()


def resumed_after(said: str) -> int:
    """The step that a run went on after; 0 where it began."""
    found = re.search(r"continuing after step (\d+) ", said)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.full) for stage in range(4)])
def test_killed_at_steps_and_inside_a_rank_change(
    stage: int, place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    """One run, killed four times at every stage, beside one that nothing disturbed: equal bit for bit."""
    ds = f"zero{stage}"
    run_training(two_processes, saving_arguments(place, tmp_path / "whole", ds, **LONG))
    words = saving_arguments(place, tmp_path / "run", ds, **LONG)
    kills = [("step 7", 1), ("step 13", 0), ("rank change 20", 1), ("step 29", 0)]
    starts = [resumed_after(kill_at(nursery, *kill, words, tmp_path / "notes")) for kill in kills]
    starts.append(resumed_after(run_training(two_processes, words)))
    newest = [0, 5, 10, 15, 25]  # or the one before, where the newest was still being written
    assert all(start in (step, step - 5, 0) for start, step in zip(starts, newest, strict=True)), starts
    assert starts == sorted(starts) and starts[-1] > 0
    assert len(training.losses(tmp_path / "run")) == 40 and len(training.ranks(tmp_path / "run")) == 11
    assert_same_run(tmp_path / "run", tmp_path / "whole", last=40)


def test_killed_inside_a_rank_change(
    place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    whole = uninterrupted_run({}, place, tmp_path, two_processes, "zero2")
    words = saving_arguments(place, tmp_path / "run", "zero2", save_every=3)
    kill_at(nursery, "rank change 8", 1, words, tmp_path / "notes")
    assert resumed_after(run_training(two_processes, words)) in (3, 6)  # 3 where 6 was still being written
    assert_same_run(tmp_path / "run", whole)


def complete(folder: Path) -> bool:
    """Whether every file is what the manifest says; read here, without the program's own reader."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return all(
        hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
        for entry in manifest["files"]
    ) and {entry["name"] for entry in manifest["files"]} | {"manifest.json"} == {
        path.name for path in folder.iterdir()
    }


@pytest.mark.full
@pytest.mark.complaint("DeepSpeed 7044", "accelerate 2912", "torchtune 2651")
def test_killed_twenty_times_while_saving(
    place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    """Each time at a random operation on a checkpoint's files, of a random process."""
    options = {"max_steps": 80, "save_every": 2, "keep_checkpoints": 2}
    run_training(two_processes, saving_arguments(place, tmp_path / "whole", "zero2", **options))
    out, words = tmp_path / "run", saving_arguments(place, tmp_path / "run", "zero2", **options)
    rng, newest, lost = random.Random(3), 0, []
    for _ in range(20):
        rank = rng.randrange(2)
        operation = rng.randint(1, 60 if rank == 0 else 6)  # process 0 also commits and removes
        said = kill_at(nursery, f"operation {operation}", rank, words, tmp_path / "notes")
        assert resumed_after(said) == newest, said
        folders = {int(p.name[5:]): p for p in (out / "checkpoints").glob("step_*")}
        assert all(complete(folder) for folder in folders.values())
        assert max(folders, default=0) >= newest
        newest = max(folders, default=0)
        saving = [int(p.name[6:14]) for p in (out / "checkpoints").glob(".step_*.part")]
        done = lines(out / "metrics.jsonl")
        lost.append(done - newest)
        assert done - newest <= 2 + (done - saving[0] if saving else 0)
    assert resumed_after(run_training(two_processes, words)) == newest
    print(f"20 of 20 restarts loaded the newest complete checkpoint; steps lost: {lost}")
    assert_same_run(out, tmp_path / "whole", last=80)


@pytest.mark.parametrize(
    ("killed", "moment", "holder"),
    [
        (1, "step 7", 1),
        pytest.param(0, "step 7", 0, marks=pytest.mark.full),
        pytest.param(1, "rank change 8", 0, marks=pytest.mark.full),
        pytest.param(1, "save 6", 1, marks=pytest.mark.full),
        pytest.param(0, "validation 4", 0, marks=pytest.mark.full),
        pytest.param(1, "start-up", 1, marks=pytest.mark.full),
        pytest.param(1, "data", 1, marks=pytest.mark.full),
    ],
)
def test_a_process_that_dies_takes_the_run_down(
    killed: int,
    moment: str,
    holder: int,
    place: Place,
    tmp_path: Path,
    two_processes: Processes,
    nursery: Nursery,
) -> None:
    words = saving_arguments(place, tmp_path / "run", "zero3", save_every=3)
    with held(nursery, words, 2, moment, holder, tmp_path / "notes") as started:
        started.run.send(signal.SIGKILL, killed)
        codes = started.run.wait(NOTICE_SECONDS)
        left = 1 - killed
        said = started.run.said(left)
    assert codes[left] == 1, said
    gone = f"error: process {killed} (pid {started.run.processes[killed].pid}) is gone"
    assert said.count("error: ") == 1 and gone in said and "Traceback" not in said
    if moment in ("step 7", "rank change 8"):
        assert resumed_after(run_training(two_processes, words)) in (3, 6)
        assert len(training.losses(tmp_path / "run")) == training.STEPS


def test_two_runs_in_one_folder_and_a_lock_that_outlives_nobody(
    place: Place, tmp_path: Path, one_process: Processes
) -> None:
    words = saving_arguments(place, tmp_path / "run", "zero2")
    with launched(words, 1) as started:
        started.wait_for(lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 1)
        started.send(signal.SIGSTOP)
        second = one_process.run(training.command, words)[0]
        assert second["code"] == 1
        assert "another run is writing to this folder" in second["stderr"]
        assert f"process {started.processes[0].pid}" in second["stderr"]
        started.send(signal.SIGKILL)
        started.wait(20)
    run_training(one_process, words)
