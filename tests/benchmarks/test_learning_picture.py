"""The picture of the starts and the market, of run folders made up here, against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import picture
from benchmarks.learning.picture import STEPS, offers_of, starts_in
from benchmarks.learning.runs import Run, Runner
from flexlora_ds.errors import UserError
from launch.options.train_options import parse_options


def made_up(runner: Runner, run: Run, losses: list[float], *words: str) -> Path:
    folder = runner.folder(run)
    folder.mkdir(parents=True)
    options = parse_options([*runner.arguments(run), *words])
    (folder / "options.yaml").write_text(options.to_yaml())
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def change(step: int, gain: dict[str, float], expanded: list[str]) -> dict[str, Any]:
    return {"step": step, "expanded": expanded, "market": {"gain": gain, "loss": {"a": 0.01}}}


def market(runner: Runner, init: str) -> Path:
    folder = made_up(runner, Run("alloc-growth", 1), [1.0], f"--init={init}")
    changes = [change(20, {"a": 0.5, "b": 0.25, "c": 0.0}, ["a"]), change(40, dict.fromkeys("abc", 0.0), [])]
    rows = [{"step": 10, "expanded": ["a"], "market": None}, *changes]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_found_by_setting_and_seed(tmp_path: Path) -> None:
    one, two = Runner(tmp_path / "one", ("--model=m",)), Runner(tmp_path / "two", ("--model=m",))
    losses = [float(step) for step in range(1, STEPS + 21)]
    made_up(one, Run("LoRA", 1), losses)
    made_up(one, Run("LoRA-GA", 1), [3.0])
    made_up(two, Run("LoRA", 2), [2.0, 1.0])
    (one.out / "LoRA-notes").mkdir()
    found, rate = starts_in([one.out, two.out])
    assert found == {"LoRA": {1: losses[:STEPS], 2: [2.0, 1.0]}, "LoRA-GA": {1: [3.0]}}
    assert rate == 3e-4


def test_what_stands_out_is_counted_at_each_change(tmp_path: Path) -> None:
    found = offers_of(market(Runner(tmp_path, ("--model=m",)), "gradient"))
    assert (found.init, found.matrices) == ("gradient", 3)
    assert found.steps == [20, 40]
    assert (found.standing_out, found.best, found.traded) == ([2, 0], [0.5, 0.0], [1, 0])


def test_the_command_draws_both_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tmp_path / "runs", ("--model=m",))
    for setting in ("LoRA", "gaussian", "gradient"):
        for seed in (1, 2):
            made_up(runner, Run(setting, seed), [2.0 / step for step in range(1, 81)])
    markets = [market(Runner(tmp_path / init, ("--model=m",)), init) for init in ("gaussian", "gradient")]
    out = tmp_path / "new" / "picture.png"
    words = ["picture", "--runs", str(runner.out), "--market", *map(str, markets), "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    picture.run()
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of the group starts"):
        starts_in([tmp_path])
    runner = Runner(tmp_path, ("--model=m",))
    folder = made_up(runner, Run("LoRA", 1), [1.0])
    with pytest.raises(UserError, match="no market"):
        offers_of(folder)
    made_up(runner, Run("gradient", 1), [1.0], "--lr=1e-3")
    with pytest.raises(UserError, match=r"LoRA-1 has lr 0.0003, .*gradient-1 has lr 0.001"):
        starts_in([tmp_path])


def test_the_picture_of_the_page_is_small() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "images" / "gradient.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= 120_000
