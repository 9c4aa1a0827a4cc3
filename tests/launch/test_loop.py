"""The batches of a run: to the last step, or until a stop is agreed; their thread ends with the loop."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.data.batches import ProcessShare, TrainingBatches
from launch.loop import finish
from launch.loop.finish import report_line
from launch.loop.session import Session
from tests.helpers.numbered_examples import PAD, make_examples

STEPS = 5


def run(stop_before: int = 99) -> Any:
    """What `Session.batches` needs of a run whose processes agree to stop before a step."""
    batches = TrainingBatches(make_examples([5] * 40, [0] * 40), 4, 1, ProcessShare(1, 0, 2), PAD)
    run = SimpleNamespace(
        data=SimpleNamespace(train=batches, steps=STEPS),
        process=SimpleNamespace(device=torch.device("cpu")),
        options=SimpleNamespace(timeout=300.0),
    )
    run.done, run.saver = 0, None
    run.stop = SimpleNamespace(before_step=lambda saver: run.done + 1 >= stop_before)
    return run


@pytest.mark.parametrize(
    ("after", "stop_before", "expected"),
    [(0, 99, [1, 2, 3, 4, 5]), (3, 99, [4, 5]), (5, 99, []), (0, 3, [1, 2]), (2, 3, [])],
)
def test_batches_come_to_the_last_step_or_until_a_stop(
    after: int, stop_before: int, expected: list[int]
) -> None:
    running, seen = run(stop_before), []
    for batch in Session.batches(running, after=after):
        assert len(list(batch.micro_batches)) == 2 and batch.tokens == 20 == batch.target_tokens + 4
        seen.append(batch.step)
    assert seen == expected
    assert running.done == (expected or [after])[-1]


def test_a_step_that_fails_is_not_done_and_leaves_no_thread() -> None:
    before, running = threading.enumerate(), run()
    with pytest.raises(ZeroDivisionError):
        for batch in Session.batches(running, after=0):
            next(batch.micro_batches)
            _ = 1 // (batch.step - 2)
    assert running.done == 1 and threading.enumerate() == before


def test_a_report_that_cannot_be_made_is_a_warning_of_a_run_that_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    line = report_line(tmp_path)
    assert line.startswith("warning: no report: not a row of a run") and "metrics.jsonl, line 1" in line
    assert f"python -m launch.report {tmp_path}" in line and "\n" not in line

    def broken(_: object) -> Path:
        raise ValueError("$x$\nParseException")

    monkeypatch.setattr(finish, "build_report", broken)
    assert "warning: no report: ValueError: $x$ ParseException" in report_line(tmp_path)
