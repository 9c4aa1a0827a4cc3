"""A disk that is full or refuses: the save fails on all processes alike, what was complete stays, exit code 1."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flexlora_ds.checkpoint import files
from tests.helpers import training
from tests.helpers.moved_folders import MOVES
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import assert_same_run, run_training, saving_arguments, uninterrupted_run
from tests.helpers.training import Place

MIB = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory, two_processes: Processes) -> Path:
    """A finished run with checkpoints after 7, 14 and 16 steps."""
    return uninterrupted_run({}, place, tmp_path_factory.mktemp("whole"), two_processes, "zero2")


def up_to_step_7(whole: Path, out: Path) -> Path:
    """A copy of the run as it was after 7 steps."""
    shutil.copytree(whole, out)
    for folder in files.checkpoints_in(out / "checkpoints")[:-1]:
        shutil.rmtree(folder)
    return out


def with_file_limit(words: list[str], process: int, limit: int) -> dict[str, Any]:
    """The training command where one process's disk takes no file larger than `limit` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        return training.command(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def assert_refused(results: list[dict[str, Any]], out: Path) -> str:
    assert [r["code"] for r in results] == [1, 1], results[0]["stderr"]
    lines = [line for r in results for line in r["stderr"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot write" in lines[0] and "free some space" in lines[0]
    assert [p.name for p in files.checkpoints_in(out / "checkpoints")] == ["step_00000007"]
    files.verify(out / "checkpoints" / "step_00000007")
    return lines[0]


def test_a_disk_that_refuses_one_process_ends_the_run_and_spares_the_checkpoints(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    out = up_to_step_7(whole, tmp_path / "run")
    results = two_processes.run(with_file_limit, saving_arguments(place, out, "zero2"), 1, 8000, timeout=300)
    assert_refused(results, out)
    assert not list((out / "checkpoints").glob(".step_*"))
    run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert_same_run(out, whole)


def test_a_log_that_cannot_be_written_ends_all_processes_alike(
    place: Place, whole: Path, tmp_path: Path, two_processes: Processes
) -> None:
    """Only process 0 writes it, and no checkpoint may come behind a log with a gap."""
    out = up_to_step_7(whole, tmp_path / "run")
    limit = sum(len(line) + 1 for line in (out / "metrics.jsonl").read_text().splitlines()[:9])
    results = two_processes.run(with_file_limit, saving_arguments(place, out, "zero2"), 0, limit, timeout=300)
    assert ".jsonl" in assert_refused(results, out)
    run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert_same_run(out, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("no tmpfs can be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave_free(folder: Path, size: int) -> Path:
    """Fill a file system until `size` bytes are left; the file that does it."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - size)
    return ballast


@pytest.mark.parametrize("free", [56 << 10, pytest.param(24 << 10, marks=pytest.mark.full)])
def test_a_full_disk(
    free: int, place: Place, whole: Path, small_disk: Path, two_processes: Processes
) -> None:
    """With room for the logs and half a checkpoint, and with room for hardly anything."""
    out = up_to_step_7(whole, small_disk / "run")
    size = sum(p.stat().st_size for p in (out / "checkpoints" / "step_00000007").iterdir())
    assert shutil.disk_usage(small_disk).total == 64 * MIB and free < size
    ballast = leave_free(small_disk, free)
    results = two_processes.run(training.command, saving_arguments(place, out, "zero2"), timeout=300)
    assert "No space left on device" in assert_refused(results, out)
    ballast.unlink()
    run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert_same_run(out, whole)


def while_the_folder_is_moved(words: list[str], kind: str, step: int) -> dict[str, Any]:
    """The training command; before the line of `step` in the log, something happens to its folder."""
    from launch.loop.run_log import RunLog

    (out,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--out="))
    say = RunLog.step

    def moving(log: RunLog, batch: Any, *rest: Any) -> None:
        if batch.step == step and log.folder.is_rank_zero:
            MOVES[kind](out)
        say(log, batch, *rest)

    with patch.object(RunLog, "step", moving):
        return training.command(words)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("renamed", {}),
        ("replaced by a link to itself", {"log_every": 100}),  # noticed by the next save
        *(
            pytest.param(kind, {"log_every": every}, marks=pytest.mark.full)
            for kind in MOVES
            for every in (1, 100)
        ),
        pytest.param("removed", {"log_every": 100, "save_every": 0}, marks=pytest.mark.full),
    ],
)
def test_a_run_whose_folder_is_another_now_ends_and_makes_none_anew(
    kind: str, options: dict[str, Any], place: Place, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    words = saving_arguments(place, out, "zero2", **options)
    results = two_processes.run(while_the_folder_is_moved, words, kind, 9)
    assert [r["code"] for r in results] == [1, 1], results[0]["stderr"]
    lines = [line for r in results for line in r["stderr"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the run folder was moved, removed or replaced" in lines[0]
    assert str(out) in lines[0] and "Traceback" not in results[0]["stderr"]
    assert out.exists() == (kind not in ("renamed", "removed"))
    assert not (out / "summary.json").exists() and not (out / "adapter").exists()
    if kind == "renamed" and not options:
        (tmp_path / "moved").rename(out)
        assert "continuing after step 7 " in run_training(two_processes, words)
