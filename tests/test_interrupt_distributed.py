"""A run that is told to stop, that is killed, that loses a process: nothing is lost, and the rest is the same run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flexlora_ds import checkpoint_files
from tests import training
from tests.distributed import Processes
from tests.launched import Launched, launched, lines
from tests.test_resume_distributed import arguments, assert_same, run, uninterrupted
from tests.training import Place

SAVE_EVERY = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory, two_processes: Processes) -> Path:
    """The run that nothing disturbed."""
    return uninterrupted({}, place, tmp_path_factory.mktemp("whole"), two_processes, "zero2")


def words(place: Place, out: Path, **options: Any) -> list[str]:
    return arguments(place, out, "zero2", save_every=SAVE_EVERY, **options)


def after_steps(run: Launched, out: Path, count: int) -> None:
    """Wait until `count` steps are in the log."""
    run.wait_for(lambda: lines(out / "metrics.jsonl") >= count)


def newest(out: Path) -> int:
    return max(checkpoint_files.step_of(p) for p in checkpoint_files.checkpoints_in(out / "checkpoints"))


@pytest.mark.parametrize(
    ("number", "ranks", "moment"),
    [
        (signal.SIGTERM, [1], "a step"),
        (signal.SIGINT, [0, 1], "a step"),
        pytest.param(signal.SIGUSR1, [0], "a step", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, [0, 1], "a step", marks=pytest.mark.full),
        pytest.param(signal.SIGUSR1, [0, 1], "start-up", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, [0], "start-up", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, [1], "a save", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, [1], "a rank change", marks=pytest.mark.full),
    ],
)
def test_a_stopped_run_continues_as_if_it_had_not_been(
    number: signal.Signals,
    ranks: list[int],
    moment: str,
    place: Place,
    whole: Path,
    tmp_path: Path,
    two_processes: Processes,
) -> None:
    out = tmp_path / "run"
    with launched(words(place, out), 2) as started:
        if moment == "start-up":
            started.wait_for_text("signals: ready")
        elif moment == "a save":
            started.wait_for(lambda: any((out / "checkpoints").glob(".step_*.part")))
        elif moment == "a rank change":
            after_steps(started, out, 4)  # the change comes in the fifth
        else:
            after_steps(started, out, 6)
        started.send(number, *ranks)
        assert started.wait(60) == [0, 0], started.said()
        said = started.said()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "stopped" and "stopping after step" in said
    done = summary["steps"]
    assert done < training.STEPS
    if moment == "start-up":
        assert done == 0 and not (out / "checkpoints").exists()
    else:
        assert newest(out) == done
    run(two_processes, words(place, out))
    assert json.loads((out / "summary.json").read_text())["state"] == "finished"
    assert_same(out, whole)


def test_a_second_signal_ends_at_once(place: Place, tmp_path: Path) -> None:
    """While the model is still being built, where the first signal cannot have been acted on yet."""
    with launched(words(place, tmp_path / "run"), 1) as started:
        started.wait_for_text("signals: ready")
        started.send(signal.SIGTERM)
        time.sleep(0.4)  # two within 0.3 s count as one
        started.send(signal.SIGTERM)
        assert started.wait(20) == [128 + signal.SIGTERM]


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, 'launch/train.py', *sys.argv[1:]])"


@pytest.mark.full
def test_an_orphan_stops_as_on_a_signal(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with launched([LAUNCHER, *words(place, out)], 1, script="-c") as started:
        after_steps(started, out, 4)
        started.send(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not (out / "summary.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert json.loads((out / "summary.json").read_text())["state"] == "stopped"
        assert "the launcher is gone" in started.said()


@pytest.mark.parametrize(
    ("killed", "count"),
    [
        ([1], 7),
        pytest.param([0], 13, marks=pytest.mark.full),
        pytest.param([0, 1], 5, marks=pytest.mark.full),
        pytest.param([0, 1], 10, marks=pytest.mark.full),
    ],
)
def test_a_killed_process_takes_the_run_down_and_the_next_start_resumes(
    killed: list[int], count: int, place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    with launched(words(place, out), 2) as started:
        after_steps(started, out, count)
        started.send(signal.SIGKILL, *killed)
        codes = started.wait(60)
        for rank in {0, 1} - set(killed):
            assert codes[rank] == 1, started.said(rank)
            assert "error: " in started.said(rank) and "Traceback" not in started.said(rank)
    said = run(two_processes, words(place, out))
    assert "continuing after step" in said
    assert_same(out, whole)


def test_two_runs_in_one_folder_and_a_lock_that_outlives_nobody(
    place: Place, tmp_path: Path, one_process: Processes
) -> None:
    out = tmp_path / "run"
    with launched(words(place, out), 1) as started:
        started.wait_for_text("signals: ready")
        started.wait_for(lambda: lines(out / "metrics.jsonl") >= 1)
        started.send(signal.SIGSTOP)
        second = one_process.run(training.command, words(place, out))[0]
        assert second["code"] == 1
        assert "another run is writing to this folder" in second["stderr"]
        assert f"process {started.processes[0].pid}" in second["stderr"]
        started.send(signal.SIGKILL)
        started.wait(20)
    run(one_process, words(place, out))


def damage_all(out: Path) -> None:
    for folder in checkpoint_files.checkpoints_in(out / "checkpoints"):
        (folder / "state.json").write_bytes(b"")


def test_falls_back_from_damage_and_never_starts_anew_silently(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shard = next((out / "checkpoints" / "step_00000016").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    said = run(two_processes, arguments(place, out, "zero2"))
    assert "damaged checkpoint" in said and shard.name in said and "continuing after step 14" in said
    assert_same(out, whole)
    damage_all(out)
    before = {p: p.read_bytes() for p in out.glob("*.json*")}
    failed = two_processes.run(training.command, arguments(place, out, "zero2"))
    assert [r["code"] for r in failed] == [1, 1]
    assert failed[0]["stderr"].count("error: no valid checkpoint is left") == 1
    assert before == {p: p.read_bytes() for p in out.glob("*.json*")}


@pytest.mark.parametrize("change", [{"rank": 6}, {"seed": 7}, {"method": "lora"}, {"cutoff_len": 90}])
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    change: dict[str, Any], place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*") if p.name != ".lock")
    results = two_processes.run(training.command, arguments(place, whole, "zero2", **change))
    assert [r["code"] for r in results] == [1, 1]
    assert f"{next(iter(change))} is" in results[0]["stderr"] and results[1]["stderr"].count("error:") == 0
    assert before == sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*") if p.name != ".lock")


def with_file_limit(arguments: list[str], process: int, limit: int) -> dict[str, Any]:
    """The training command where one process's disk takes no file larger than `limit` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        return training.command(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_refuses_one_process_ends_the_run_and_spares_the_checkpoints(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for folder in checkpoint_files.checkpoints_in(out / "checkpoints")[:-1]:
        shutil.rmtree(folder)
    results = two_processes.run(with_file_limit, arguments(place, out, "zero2"), 1, 8000, timeout=300)
    assert [r["code"] for r in results] == [1, 1]
    assert "error: cannot write" in results[0]["stderr"] and "free some space" in results[0]["stderr"]
    assert [p.name for p in checkpoint_files.checkpoints_in(out / "checkpoints")] == ["step_00000007"]
    assert not list((out / "checkpoints").glob(".step_*"))
    run(two_processes, arguments(place, out, "zero2"))
    assert_same(out, whole)


def test_rewinding_keeps_what_it_leaves(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    said = run(two_processes, arguments(place, out, "zero2", resume=out / "checkpoints" / "step_00000007"))
    assert "continuing after step 7" in said and "set_aside_step_00000014" in said
    assert_same(out, whole)
    again = run(two_processes, arguments(place, out, "zero2", resume=out / "checkpoints" / "step_00000007"))
    assert "already continued" in again and "continuing after step 16" in again
