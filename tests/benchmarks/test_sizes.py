"""One run at several sizes: what is measured is the run's own loss, and what is cut off is cut off of its adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning.runs import Run, Runner
from benchmarks.sizes.__main__ import parse
from benchmarks.sizes.curves import CURVES, PARA, TRAINED, TRUNCATED, Family, Point, measure, table
from benchmarks.sizes.picture import draw
from benchmarks.sizes.whole import HeldOut
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.peft_reading.plain import read_peft_adapter
from tests.helpers.processes import Processes
from tests.helpers.training import SMALL, command, make_place, read_lines

FAMILY = Family("gradient", None, None, (0.5,), 4, 1)


def test_a_run_and_its_parts_are_measured_as_the_run_measures(tmp_path: Path, one_process: Processes) -> None:
    place = make_place(tmp_path)
    options = {"model": place.model, "data": place.data, "recipe": "demo", **SMALL}
    options |= {"max_steps": 6, "adjust_size": 0, "val_every": 3}
    runner = Runner(tmp_path / "out", tuple(f"--{key}={value}" for key, value in options.items()))
    for run in FAMILY.runs(1):
        (done,) = one_process.run(command, runner.arguments(run))
        assert done["code"] == 0, done["stderr"]
    points = {(p.curve, p.fraction): p for p in measure(FAMILY, runner, 1)}
    assert set(points) == {(TRUNCATED, 1.0), (TRUNCATED, 0.5), (TRAINED, 0.5), (PARA, 1.0), (PARA, 0.5)}
    for curve, run in zip((TRUNCATED, PARA), FAMILY.whole(1), strict=True):
        logged = read_lines(runner.folder(run) / "validation.jsonl")[-1]["loss"]
        assert points[curve, 1.0].loss == pytest.approx(logged, rel=1e-5)
        assert points[curve, 0.5].loss != points[curve, 1.0].loss
        assert points[curve, 0.5].parameters <= points[curve, 1.0].parameters / 2
    assert points[TRAINED, 0.5].parameters == points[TRUNCATED, 1.0].parameters / 2
    folder = runner.folder(FAMILY.whole(1)[0])
    whole = read_peft_adapter(folder / "adapter")
    other = {name: replace(m, scale=2 * m.scale) for name, m in whole.matrices.items()}
    with pytest.raises(RunError, match="its layers in fp32 give the validation loss"):
        HeldOut(folder).whole_loss(replace(whole, matrices=other))
    rows = read_lines(folder / "validation.jsonl")
    rows[-1]["loss"] *= 1.001
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match="its adapter gives the validation loss"):
        HeldOut(folder).whole_loss(whole)


def test_the_table_has_means_and_every_seed(tmp_path: Path) -> None:
    points = [Point(curve, 0.5, seed, 500, 0.1 * seed) for curve in CURVES for seed in (1, 2)]
    points += [Point(TRUNCATED, 1.0, seed, 1000, 0.05) for seed in (1, 2)]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table(points).splitlines()]
    assert lines[2] == ["parameters", "1,000", "500"]
    assert lines[3] == [TRUNCATED, "0.0500 (0.0500, 0.0500)", "0.1500 (0.1000, 0.2000)"]
    assert lines[4] == [TRAINED, "–", "0.1500 (0.1000, 0.2000)"]
    draw(points, tmp_path / "a" / "sizes.png")
    assert (tmp_path / "a" / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_share_that_is_no_rank_is_refused() -> None:
    with pytest.raises(UserError, match=r"0.3 of rank 4 is no smaller whole rank"):
        replace(FAMILY, fractions=(0.3,)).smaller(1)
    assert replace(FAMILY, fractions=(0.75,)).smaller(2) == {0.75: Run("gradient", 2, rank=3)}


def test_lora_is_no_setting_to_truncate_beside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.sizes", "--setting=LoRA"])
    with pytest.raises(UserError, match=r"--setting: invalid choice: 'LoRA'"):
        parse()
