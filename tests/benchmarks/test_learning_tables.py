"""The figures and tables of a comparison, of run folders made up here, against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.intervals import paired_difference
from benchmarks.learning.comparison import Comparison, compare
from benchmarks.learning.figures import growth, training, validation, worth
from benchmarks.learning.further import COUNT, FURTHER
from benchmarks.learning.runs import Run, Runner, require_same_options
from benchmarks.learning.tables import (
    further_table,
    growth_table,
    rates_table,
    training_table,
    validation_table,
)
from flexlora_ds.errors import UserError
from launch.options.train_options import parse_options


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(end: float, early: float = 1.0, **others: float) -> dict[str, float]:
    quarters = {f"loss {k}/4": float(k) for k in (1, 2, 3, 4)}
    return {"lr": 3e-4, "mean parameters": 1000.0, "early": early, "val, end": end, **quarters, **others}


def cells(text: str, setting: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {setting} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_losses_are_averaged_over_the_steps_that_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": float(s)} for s in range(1, 81)])
    # Means of 1…40, and of 1…20, 21…40, 41…60, 61…80.
    assert training(tmp_path) == {
        "early": 20.5,
        "loss 1/4": 10.5,
        "loss 2/4": 30.5,
        "loss 3/4": 50.5,
        "loss 4/4": 70.5,
    }
    validations = [{"step": s, "loss": loss} for s, loss in ((0, 9.0), (20, 5.0), (40, 3.0), (80, 2.0))]
    write_lines(tmp_path / "validation.jsonl", validations)
    assert validation(tmp_path) == {"val, middle": 3.0, "val, end": 2.0}


def test_what_follows_a_growth_begins_behind_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": float(s)} for s in range(1, 81)])
    assert growth(tmp_path) == {}
    changes = [{"step": s, "pruned": [], "expanded": ["a"] if s < 24 else []} for s in range(20, 26)]
    write_lines(tmp_path / "ranks.jsonl", changes)
    # Means of 21…40 and of 24…43.
    assert growth(tmp_path) == {
        "grown from": 20,
        "grown to": 23,
        "loss after first": 30.5,
        "loss after last": 33.5,
    }
    write_lines(tmp_path / "ranks.jsonl", [{"step": 20, "pruned": ["b"], "expanded": ["a"]}])
    assert growth(tmp_path) == {}, "ranks that move are no growth"


def test_an_interval_of_few_differences_is_their_range() -> None:
    gap = paired_difference([1.0, 2.0, 4.0], [2.0, 2.5, 1.0])
    assert gap.each == (-1.0, -0.5, 3.0)
    assert (gap.mean, gap.low, gap.high) == (0.5, -1.0, 3.0)
    many = paired_difference([float(k % 2) for k in range(400)], [0.0] * 400)
    # ± 1.96 standard errors: 0.5 / √400 = 0.025.
    assert (many.low, many.high) == pytest.approx((0.451, 0.549), abs=0.006)


def made_up(folder: Path) -> dict[str, float]:
    figures: dict[str, float] = json.loads((folder / "figures.json").read_text())
    return figures


def lay_out(runner: Runner, losses: dict[Run, dict[str, float]]) -> None:
    for run, figures in losses.items():
        folder = runner.folder(run)
        folder.mkdir(parents=True)
        (folder / "figures.json").write_text(json.dumps(figures))
        (folder / "summary.json").write_text('{"state": "finished"}')


def test_each_setting_runs_at_its_own_best_rate(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    lay_out(
        runner,
        {
            Run("LoRA", 1, "1e-4"): row(0.5, early=2.0),
            Run("LoRA", 1, "1e-3"): row(0.3, early=4.0),
            Run("LoRA", 2, "1e-3"): row(0.4, early=8.0),
            Run("gradient", 1, "1e-4"): row(0.2, early=1.0),
            Run("gradient", 1, "1e-3"): row(0.6),
            Run("gradient", 2, "1e-4"): row(0.45, early=2.0),
        },
    )
    found = compare(runner, ["LoRA", "gradient"], [1, 2], ["1e-4", "1e-3"], "LoRA", read=made_up)
    assert found.chosen == {"LoRA": "1e-3", "gradient": "1e-4"}
    assert cells(rates_table(found), "gradient")[1:] == ["0.2000", "0.6000", "1e-4"]
    assert further_table(found) == ""
    text = validation_table(found)
    assert cells(text, "gradient")[5:] == [
        "0.2000, 0.4500",
        "-0.1000, +0.0500",
        "-0.0250 (-0.1000 to +0.0500)",
    ]
    assert "Of 2 differences" in text
    # To LoRA at 1e-4, which ran on seed 1 alone, and to LoRA at its own 1e-3.
    assert cells(training_table(found), "gradient")[-3:] == ["1.000, 2.000", "0.500, –", "0.250, 0.250"]


def test_rates_are_chosen_on_further_records_where_they_were_measured(tmp_path: Path) -> None:
    def further(end: float, loss: float) -> dict[str, float]:
        return row(end) | {FURTHER: loss, COUNT: 192}

    runner = Runner(tmp_path)
    made = {
        Run("LoRA", 1, "1e-4"): further(0.2, 0.5),
        Run("LoRA", 1, "1e-3"): further(0.3, 0.4),
        Run("LoRA", 2, "1e-3"): further(0.3, 0.3),
        Run("gradient", 1, "1e-4"): further(0.3, 0.3),
        Run("gradient", 1, "1e-3"): further(0.2, 0.5),
        Run("gradient", 2, "1e-4"): further(0.3, 0.5),
    }
    lay_out(runner, made)
    found = compare(runner, ["LoRA", "gradient"], [1, 2], ["1e-4", "1e-3"], "LoRA", read=made_up)
    assert found.chosen == {"LoRA": "1e-3", "gradient": "1e-4"}
    assert cells(rates_table(found), "gradient")[1:] == ["0.3000", "0.5000", "1e-4"]
    text = further_table(found)
    assert "held out (192 records, fp32)" in text
    assert cells(text, "LoRA")[2:] == ["0.3500", "0.4000, 0.3000", "–", "–"]
    assert cells(text, "gradient")[2:5] == ["0.4000", "0.3000, 0.5000", "-0.1000, +0.2000"]
    assert cells(text, "gradient")[5] == "+0.0500 (-0.1000 to +0.2000)"


def test_growth_is_compared_with_gaussian_growth_at_the_same_step() -> None:
    def grown(step: int, after: float) -> dict[str, float]:
        steps = {"grown from": step, "grown to": step + 3}
        return row(0.1, **steps, **{"loss after first": after, "loss after last": after / 2})

    names = ("grow", "grow-gradient", "grow-late", "grow-late-gradient")
    figures = dict(
        zip(names, (grown(20, 4.0), grown(20, 1.0), grown(100, 0.5), grown(100, 0.6)), strict=True)
    )
    found = {Run(name, 1): figures[name] for name in names} | {Run("gaussian", 1): row(0.2)}
    settings = [*names, "gaussian"]
    text = growth_table(Comparison(settings, [1], [], dict.fromkeys(settings), found, None))
    assert cells(text, "grow-gradient")[1:6] == ["20–23", "1.0000", "0.250", "0.5000", "0.250"]
    assert cells(text, "grow-late-gradient")[1:4] == ["100–103", "0.6000", "1.200"]
    assert "gaussian" not in text


def test_a_run_of_other_options_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    runner = Runner(tmp_path, ("--model=m", "--dtype=auto"))
    words = runner.arguments(Run("gaussian", 1, "1e-3"))
    require_same_options(tmp_path, words)  # nothing lies there yet
    kept = parse_options([*words, "--dtype=bf16", "--save_every=0", "--out=elsewhere"])
    (tmp_path / "options.yaml").write_text(kept.to_yaml())
    require_same_options(tmp_path, words)
    with pytest.raises(UserError, match=r"has lr 0.001, and lr 0.0003 is asked for"):
        require_same_options(tmp_path, runner.arguments(Run("gaussian", 1, "3e-4")))


def test_a_smaller_rank_keeps_the_scale(tmp_path: Path) -> None:
    runner = Runner(tmp_path, ("--model=m",))
    run = Run("gradient", 1, rank=6)
    options = parse_options(runner.arguments(run))
    assert (options.rank, options.alpha, options.init) == (6, 12.0, "gradient")
    assert runner.folder(run) == tmp_path / "gradient-rank-6-1"


def test_figures_hold_the_worth_of_what_was_grown(tmp_path: Path) -> None:
    assert worth(tmp_path) == {}
    rises = [{"born": [5], "survivors": 1, "rise": 0.25}, {"born": [6], "survivors": 1, "rise": 0.5}]
    found = {"loss": 1.0, "changes": rises, "together": {"born": [5, 6], "survivors": 2, "rise": 1.0}}
    (tmp_path / "directions.json").write_text(json.dumps(found))
    assert worth(tmp_path) == {"worth together": 1.0, "worth one by one": 0.75}
    (tmp_path / "directions.json").write_text(json.dumps({**found, "loss": None}))
    assert worth(tmp_path) == {}
