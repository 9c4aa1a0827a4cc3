"""Trackers: what they are told of a run is what its logs say, each row once, and none of them can harm the run."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexlora_ds.errors import RunError, UserError
from launch.options.train_options import parse_options
from launch.run_folder.folder import RunFolder
from launch.trackers import __main__ as command
from launch.trackers.beside import Trackers
from launch.trackers.known import require_installed
from launch.trackers.log_tail import RunTail
from launch.trackers.teller import Teller
from tests.helpers.stub_tracker import FAULTS, write_stub
from tests.helpers.training import read_lines
from tests.helpers.wandb_file import wandb_records
from tests.helpers.written_run import MATRICES, begin_run, end_run, write_steps


def tell_all(name: str, run: Path, after: int | None = None) -> None:
    """As a tracker's process does for a run that has ended."""
    teller = Teller(name, run, after)
    teller.tell(ended=True)
    teller.finish()


def crash_and_resume(name: str, run: Path) -> RunFolder:
    """A run that dies after step 12 and goes on, otherwise than before, from its checkpoint of step 8 to step 15."""
    folder = begin_run(run)
    teller = Teller(name, run, None)
    write_steps(folder, 1, 6)
    teller.tell(ended=False)
    write_steps(folder, 7, 12)
    teller.tell(ended=True)
    teller.finish()
    folder.continue_after(8)
    write_steps(folder, 9, 15, shift=0.5)
    end_run(folder, 15)
    tell_all(name, run, after=8)
    return folder


def expected_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, what the logs say at each step, read plainly; numbers that were not finite are nowhere."""
    rows = read_lines(run / "metrics.jsonl")
    changes = read_lines(run / "ranks.jsonl")
    named = {
        "train/loss": "loss",
        "train/grad_norm": "grad_norm",
        "train/lr": "lr",
        "memory/peak_gb": "peak_mem_gb",
    }
    named |= {"speed/tokens_per_s": "tokens_per_s", "train/total_rank": "total_rank"}
    found = {name: [(r["step"], r[key]) for r in rows if r[key] is not None] for name, key in named.items()}
    found["validation/loss"] = [(r["step"], r["loss"]) for r in read_lines(run / "validation.jsonl")]
    for matrix in MATRICES:
        found[f"rank/{matrix}"] = [(c["step"], c["ranks"][matrix]) for c in changes]
        found[f"entropy/{matrix}"] = [(c["step"], c["importance"][matrix]) for c in changes]
    return found


def require_same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    """Steps in order and once, numbers to fp32."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_tensorboard_reads_back_what_the_logs_say_also_after_a_crash(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    crash_and_resume("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "tensorboard"))
    events.Reload()
    for name, expected in expected_scalars(tmp_path / "run").items():
        require_same([(event.step, event.value) for event in events.Scalars(name)], expected)
    pictures = events.Images("ranks")
    assert [picture.step for picture in pictures] == [
        5,
        15,
    ]  # that of 10 was taken back; 10 and 15 came at once
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)


def test_wandb_writes_an_offline_run_and_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    crash_and_resume("wandb", run)
    wandb.teardown()  # as the end of a tracker's process does: its service then has written everything
    records = [
        r for file in sorted(run.glob("tracking/wandb/offline-run-*/*.wandb")) for r in wandb_records(file)
    ]
    ids = {record.run.run_id for record in records if record.HasField("run")}
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert ids == {json.loads((run / "tracking" / "wandb.json").read_text())["id"]}
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in losses] == list(range(1, 16))  # 9 to 12 once, as they were told first
    assert losses[:8] == expected_scalars(run)["train/loss"][:8]
    assert [row["step"] for row in rows if any(key.startswith("ranks.") for key in row)] == [5, 10, 15]


def test_mlflow_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/ml.db")
    monkeypatch.chdir(tmp_path)
    crash_and_resume("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    (found,) = client.search_runs([client.get_experiment_by_name("flexlora").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["model"] == "m"
    history = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss"))
    assert [step for step, _ in history] == list(range(1, 16))
    artifacts = [file.path for file in client.list_artifacts(found.info.run_id, "ranks")]
    assert artifacts == [f"ranks/step-{step:08d}.png" for step in (5, 10, 15)]


def test_trackio_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio, "TRACKIO_DIR", tmp_path / "trackio")
    crash_and_resume("trackio", tmp_path / "run")
    with sqlite3.connect(tmp_path / "trackio" / "flexlora.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    name = json.loads((tmp_path / "run" / "tracking" / "trackio.json").read_text())["id"]
    assert {row[0] for row in rows} == {name}
    steps = sorted(step for _, step, text in rows if "train/loss" in json.loads(text))
    assert steps == list(range(1, 16))


class Spoken:
    """The warnings of trackers, and what they wrote before the test looked."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def wait_for(self, look: Callable[[], None]) -> None:
        """Look until there is a warning."""
        deadline = time.monotonic() + 60
        while not self.lines and time.monotonic() < deadline:
            look()
            time.sleep(0.05)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracker_that_fails_is_one_warning_and_holds_nothing_up(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_stub(tmp_path / "stub", fault)), prepend=os.pathsep)
    folder, said = begin_run(tmp_path / "run"), Spoken()
    write_steps(folder, 1, 4)
    trackers = Trackers(["wandb"], folder.path, None, said.lines.append)
    if fault != "hangs":
        said.wait_for(trackers.look)
    end_run(folder, 4)
    trackers.look()
    trackers.close(3.0)
    words = {
        "import": "no such library",
        "start": "no API key",
        "middle": "the service is gone",
        "killed": "signal 9",
        "hangs": "was not done 3 s after the run",
    }
    (line,) = said.lines
    assert line.startswith("tracker wandb ") and words[fault] in line and "\n" not in line
    assert line.endswith(f"python -m launch.trackers wandb {folder.path} tells it what it lacks")


def test_the_rows_of_all_logs_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run")
    tail = RunTail(folder)
    assert tail.new(ended=False) == []  # a validation before the first step waits for it
    write_steps(folder, 1, 5)
    folder.log_rank_change({**folder.rank_changes.read()[0], "step": 7})  # its step's row is not written yet
    first = [(entry.step, entry.log) for entry in tail.new(ended=False)]
    assert first[:2] == [(0, "validation.jsonl"), (1, "metrics.jsonl")]
    assert [step for step, _ in first] == [0, 1, 2, 3, 4, 5, 5, 5]
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line in the middle of being written
    assert tail.new(ended=False) == []
    assert [(entry.step, entry.log) for entry in tail.new(ended=True)] == [(7, "ranks.jsonl")]


def test_a_log_with_a_line_of_anything_else_is_refused(tmp_path: Path) -> None:
    folder = begin_run(tmp_path / "run")
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunError, match=r"not a row of a run: loss is missing .*metrics\.jsonl"):
        RunTail(folder).new(ended=True)


def test_what_is_missing_or_unknown_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"tensorbord is not allowed.*--track.*did you mean tensorboard\?"):
        parse_options(["--track", "tensorbord", "--model", "m"])
    with pytest.raises(UserError, match="names of tensorboard, wandb, trackio, mlflow, separated by commas"):
        parse_options(["--track", "wandb,nothing", "--model", "m"])
    options = parse_options(["--track", "wandb, tensorboard", "--model", "m"])
    assert options.track == ("wandb", "tensorboard") and "track: [wandb, tensorboard]" in options.to_yaml()
    assert parse_options(["--track", "none", "--model", "m"]).track is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed \(key track\); pip install mlflow"):
        require_installed(["mlflow"], "key track")
    monkeypatch.undo()
    monkeypatch.setattr(command, "_ends_by_its_input_alone", lambda: None)
    pytest.importorskip("tensorboard")
    tmp_path.joinpath("empty").mkdir()
    assert command.main(["tensorboard", str(tmp_path / "empty")]) == 2
    assert "no run to track: metrics.jsonl is missing" in capsys.readouterr().err


def test_a_run_tracked_afterwards_by_hand_is_told_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = begin_run(tmp_path / "run")
    write_steps(folder, 1, 3)
    end_run(folder, 3)
    for _ in range(2):
        assert command.main(["tensorboard", str(folder.path)]) == 0
    events = EventAccumulator(str(folder.path / "tracking" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    told: dict[str, Any] = json.loads((folder.path / "tracking" / "tensorboard.json").read_text())
    assert told == {"id": "tensorboard", "last": {"validation.jsonl": 0, "metrics.jsonl": 3}}
