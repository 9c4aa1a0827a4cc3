"""Several processes share an evaluation: the same predictions, also after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.tasks import TASKS
from eval.__main__ import main
from tests import eval_tiny

GAP = 1e-4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    eval_tiny.make_model(seed=4).save_pretrained(place / "model")
    eval_tiny.make_tokenizer().save_pretrained(place / "model")
    eval_tiny.write_data(place / "data", 12)
    assert main(arguments(place, place / "alone")) == 0
    return place


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    return ["--model", f"{place}/model", "--data", f"{place}/data", "--out", f"{out}", *more]


def launch(place: Path, out: Path, processes: int, *more: str) -> subprocess.Popen[str]:
    """torchrun in a session of its own, so that a kill reaches the launcher and its processes alike."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        f"--master_port={port}",
    ]
    command = [*run, "-m", "eval", *arguments(place, out, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def predictions(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for task in TASKS:
        for text in (out / "predictions" / f"{task}.jsonl").read_text().splitlines():
            line = json.loads(text)
            assert (task, line["index"]) not in found
            found[task, line["index"]] = line
    return found


def assert_same(out: Path, reference: Path) -> None:
    ours, theirs = predictions(out), predictions(reference)
    assert list(ours) == list(theirs)
    for key, line in ours.items():
        if min(line["margin"], theirs[key]["margin"]) >= GAP:
            assert (line["output"], line["prediction"]) == (theirs[key]["output"], theirs[key]["prediction"])
    totals = json.loads((out / "results.json").read_text())
    assert sum(t["total"] for t in totals["tasks"].values()) == len(ours)


def lines_written(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (out / "predictions").glob("*.jsonl"))


def kill_after(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    """SIGKILL the launcher and all its processes as soon as so many predictions are on disk."""
    while lines_written(out) < lines and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # ends only when the last process has: none survives its launcher


def test_two_processes_equal_one(place: Path, tmp_path: Path) -> None:
    process = launch(place, tmp_path / "out", 2, "--batch_size", "3")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same(tmp_path / "out", place / "alone")
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["processes"] == 2


def test_a_killed_evaluation_continues(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(launch(place, out, 2, "--batch_size", "1"), out, 20)
    assert not (out / "results.json").exists()
    written = lines_written(out)
    assert 20 <= written < 12 * len(TASKS)
    assert main(arguments(place, out)) == 0  # one process continues what two began
    assert_same(out, place / "alone")


def test_a_fault_is_told_once(place: Path, tmp_path: Path) -> None:
    process = launch(place, tmp_path / "out", 2, "--adapter", str(tmp_path / "none"))
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("error: no adapter folder") == 1


@pytest.mark.full
def test_five_kills_lose_and_repeat_nothing(place: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    for kill in range(1, 6):
        kill_after(launch(place, out, 2, "--batch_size", "1"), out, 15 * kill + rng.randrange(10))
        assert not (out / "results.json").exists()
    process = launch(place, out, 2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same(out, place / "alone")


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("batch_size", ["1", "8", "32", "auto"])
def test_invariance_at_full_size(place: Path, tmp_path: Path, processes: int, batch_size: str) -> None:
    """200 items per task, every batch size and process count."""
    eval_tiny.write_data(tmp_path / "data", 200)
    for out, count in ((tmp_path / "alone", 1), (tmp_path / "shared", processes)):
        process = launch(
            place, out, count, "--data", f"{tmp_path}/data", "--batch_size", batch_size if count > 1 else "1"
        )
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    assert_same(tmp_path / "shared", tmp_path / "alone")
