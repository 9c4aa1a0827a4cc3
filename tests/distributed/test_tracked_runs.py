"""Whole runs with trackers: TensorBoard through a resume, beside a tracker that is killed in the middle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.stub_tracker import write_stub
from tests.helpers.training import CHANGES, read_lines


def tracked(arguments: list[str], stub: str) -> dict[str, Any]:
    """The training command, with a package on the path of its process and of what that starts."""

    sys.path.insert(0, stub)
    try:
        return training.command(arguments, {"PYTHONPATH": stub})
    finally:
        sys.path.remove(stub)


@pytest.mark.full
def test_a_tracker_killed_in_the_middle_is_a_warning_and_another_goes_on_through_a_resume(
    one_process: Processes, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, stub, out = (
        training.make_place(tmp_path),
        write_stub(tmp_path / "stub", "killed"),
        tmp_path / "run",
    )
    options = {"track": "tensorboard,wandb", "save_every": 6, "weigh_directions": False}
    for _ in range(2):
        (result,) = one_process.run(tracked, place.arguments(out, 0, **options), str(stub), timeout=300)
        assert result["code"] == 0, result["stderr"]
        shutil.rmtree(out / "checkpoints" / "step_00000016", ignore_errors=True)
    assert "continuing after step 12" in result["stdout"] + result["stderr"]
    said = [line for line in (result["stdout"] + result["stderr"]).splitlines() if "tracker wandb" in line]
    assert len(said) == 1 and "signal 9" in said[0]

    events = EventAccumulator(str(out / "tracking" / "tensorboard"))
    events.Reload()
    rows = read_lines(out / "metrics.jsonl")
    told = events.Scalars("train/loss")
    assert [event.step for event in told] == [row["step"] for row in rows]
    assert [event.value for event in told] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    matrices = {name for change in read_lines(out / "ranks.jsonl") for name in change["ranks"]}
    for matrix in matrices:
        assert [event.step for event in events.Scalars(f"rank/{matrix}")] == CHANGES
        assert [event.step for event in events.Scalars(f"entropy/{matrix}")] == CHANGES
    assert events.Images("ranks")[-1].step == CHANGES[-1]
    assert json.loads((out / "summary.json").read_text())["state"] == "finished"
