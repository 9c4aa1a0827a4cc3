"""Several processes share an evaluation: the same predictions, also after kills."""

from __future__ import annotations

import contextlib
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

from data_prep.__main__ import main as data_prep
from data_prep.demo import sample as demo
from data_prep.tasks import TASKS
from eval.__main__ import main
from eval.items import load_questions
from tests.helpers import eval_tiny

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
    """Predictions on disk; a log may be merged, and removed, between listing and reading."""
    count = 0
    for path in (out / "predictions").glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b"\n")
    return count


def kill_after(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    """SIGKILL the launcher and all its processes as soon as so many predictions are on disk."""
    while lines_written(out) < lines and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # ends only when the last process has: none survives its launcher


def test_two_processes_equal_one(place: Path, tmp_path: Path) -> None:
    process = launch(place, tmp_path / "out", 2, "--batch_size", "3")
    _, error = process.communicate(timeout=300)
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


def test_an_error_is_printed_once(place: Path, tmp_path: Path) -> None:
    process = launch(place, tmp_path / "out", 2, "--adapter", str(tmp_path / "none"))
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert error.count("error: no adapter folder") == 1


@pytest.mark.full
def test_five_kills_lose_and_repeat_nothing(place: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    for kill in range(1, 6):
        kill_after(launch(place, out, 2, "--batch_size", "1"), out, 15 * kill + rng.randrange(10))
        assert not (out / "results.json").exists()
    process = launch(place, out, 2)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert_same(out, place / "alone")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated sample with 200 items per task, a model that answers, and what it answers at batch size 1."""
    place = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TEST_ROWS", 200)
        demo.write_raw(place / "raw", 42)
    assert data_prep(["--source", f"{place}/raw", "--out", f"{place}/data"]) == 0
    tokenizer, model = eval_tiny.make_tokenizer(), eval_tiny.make_model(seed=4)
    questions = [q for task in TASKS for q in load_questions(place / "data", task, "alpaca", 12)]
    eval_tiny.teach(model, tokenizer, questions)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for mode in ("generate", "score"):
        assert main(arguments(place, place / mode, "--mode", mode, "--batch_size", "1")) == 0
    return place


@pytest.mark.full
@pytest.mark.parametrize("mode", ["generate", "score"])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", ["1", "8", "32", "auto"])
def test_invariance_at_full_size(
    sample: Path, tmp_path: Path, processes: int, batch_size: str, mode: str
) -> None:
    """200 items per task: every batch size and process count gives the predictions of batch size 1."""
    options = ["--mode", mode, "--batch_size", batch_size]
    if processes == 1:
        assert main(arguments(sample, tmp_path / "out", *options)) == 0
    else:
        process = launch(sample, tmp_path / "out", processes, *options)
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    reference = predictions(sample / mode)
    assert len(reference) == 200 * len(TASKS)
    answered = [line["prediction"] for line in reference.values() if line["prediction"]]
    assert len(answered) > 800 and len(set(answered)) > 6  # silence would agree with silence
    apart = differences(predictions(tmp_path / "out"), reference)
    print(f"{mode}, {processes} processes, batch size {batch_size}: {len(apart)} differ {apart}")
    assert all(margin < GAP for _, _, margin in apart)


def differences(ours: dict[Any, Any], theirs: dict[Any, Any]) -> list[tuple[str, int, float]]:
    """Task, index and smallest margin of the items with different predictions."""
    assert list(ours) == list(theirs)
    return [
        (*key, min(line["margin"], theirs[key]["margin"]))
        for key, line in ours.items()
        if line["prediction"] != theirs[key]["prediction"]
    ]
