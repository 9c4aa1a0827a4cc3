"""Comparing evaluations: figures against hand counts and a plain bootstrap."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.compare.__main__ import main, read_settings, report
from eval.compare.differences import Run, Setting, agreement, difference
from eval.predictions import Prediction
from flexlora_ds.files.text import write_json_atomically


def make_prediction(task: str, index: int, prediction: str | None, answer: str = "true") -> Prediction:
    return Prediction(task, index, f"{index:016x}", prediction or "", prediction, answer)


def write_run(folder: Path, answers: dict[str, list[str | None]], **settings: Any) -> Path:
    """An evaluation's folder whose right answers are all 'true'."""
    (folder / "predictions").mkdir(parents=True)
    tasks = {}
    for task, given in answers.items():
        predictions = [make_prediction(task, i, a) for i, a in enumerate(given)]
        lines = [json.dumps(p.to_json()) + "\n" for p in predictions]
        (folder / "predictions" / f"{task}.jsonl").write_text("".join(lines))
        tasks[task] = {"total": len(given)}
    summary = {
        "model": "m",
        "adapter": settings.pop("adapter", None),
        "protocol": settings.pop("protocol", "score v1"),
        "tasks": tasks,
        "settings": {"prompt": "alpaca", "dtype": "float32", **settings},
    }
    (folder / "results.json").write_text(json.dumps(summary))
    return folder


def setting(name: str, *runs: dict[str, list[str | None]]) -> Setting:
    made = [
        Run(
            Path(name),
            {},
            {t: tuple(make_prediction(t, i, a) for i, a in enumerate(g)) for t, g in run.items()},
        )
        for run in runs
    ]
    return Setting(name, tuple(made))


def test_bootstrap_interval_is_that_of_resampled_items() -> None:
    rng = np.random.default_rng(3)
    first = ["true" if x else "false" for x in rng.random(80) < 0.5]
    second = ["true" if x else "false" for x in rng.random(80) < 0.7]
    ours = difference(setting("a", {"boolq": list(first)}), setting("b", {"boolq": list(second)}), ["boolq"])
    gains = np.array([(b == "true") - (a == "true") for a, b in zip(first, second, strict=True)], dtype=float)
    means = [gains[rng.integers(0, 80, 80)].mean() for _ in range(10_000)]
    assert ours.value == pytest.approx(gains.mean())
    assert (ours.low, ours.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.013)


def test_pairing_counts() -> None:
    """Equal runs differ by nothing, surely; an unpaired interval would be wide."""
    run: dict[str, list[str | None]] = {"boolq": ["true", "false"] * 20}
    same = difference(setting("a", run), setting("b", run), ["boolq"])
    assert (same.value, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)


def test_tasks_count_the_same_whatever_their_size() -> None:
    first = setting("a", {"boolq": ["false"] * 100, "piqa": ["false"] * 2})
    second = setting("b", {"boolq": ["false"] * 100, "piqa": ["true"] * 2})
    assert difference(first, second, ["boolq", "piqa"]).value == pytest.approx(0.5)


def test_seeds_are_averaged_with_their_spread() -> None:
    seeds = setting(
        "s", {"boolq": ["true", "true", "true", "false"]}, {"boolq": ["true", "false", "false", "false"]}
    )
    assert seeds.accuracy("boolq") == pytest.approx(0.5)
    assert seeds.spread(["boolq"]) == pytest.approx(np.std([0.75, 0.25], ddof=1))
    assert seeds.item_means("boolq").tolist() == [1, 0.5, 0.5, 0]
    assert setting("one", {"boolq": ["true"]}).spread(["boolq"]) is None


def test_agreement_leaves_out_what_neither_answered() -> None:
    first = setting("a", {"boolq": [None, None, "true", "false", "true"]})
    second = setting("b", {"boolq": [None, "true", "true", "true", "true"]})
    assert agreement(first, second, ["boolq"]) == pytest.approx(2 / 4)
    nothing = setting("n", {"boolq": [None] * 5})
    assert np.isnan(agreement(nothing, nothing, ["boolq"]))


def test_command_writes_table_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "before", {"boolq": ["true", "false", None, "false"]})
    b = write_run(tmp_path / "after", {"boolq": ["true", "true", "true", "false"], "piqa": ["true"]})
    assert main([str(a), str(b), "--paper", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["boolq"][:2] == ["25.00", "75.00"] and rows["boolq"][2].startswith("+50.00 [")
    assert rows["unanswered"] == ["1", "0", ""]
    assert "Only the tasks that all have: boolq" in text
    assert "cited, not measured" in text and rows["FlexLoRA r=8"] == ["21.2M", "74.3", "85.2"]


def test_seeds_are_recognised_by_the_adapters_path(tmp_path: Path) -> None:
    answers: dict[str, list[str | None]] = {"boolq": ["true", "false"]}
    runs = [write_run(tmp_path / f"r{i}", answers, adapter=f"runs/flex_seed{i}/adapter") for i in (1, 2)]
    other = write_run(tmp_path / "other", answers, adapter="runs/lora/adapter")
    settings = read_settings([str(runs[0]), str(other), str(runs[1])])
    assert [(s.name, len(s.runs)) for s in settings] == [("r1", 2), ("other", 1)]
    named = read_settings([f"both={runs[0]},{other}"])
    assert [(s.name, len(s.runs)) for s in named] == [("both", 2)]


def test_a_folders_name_may_hold_the_signs_of_a_list(tmp_path: Path) -> None:
    answers: dict[str, list[str | None]] = {"boolq": ["true", "false"]}
    runs = [write_run(tmp_path / name, answers) for name in ("lr=1e-3", "a,b")]
    settings = read_settings([str(run) for run in runs])
    assert [(s.name, s.runs[0].folder) for s in settings] == [("lr=1e-3", runs[0]), ("a,b", runs[1])]


def test_protocols_are_told_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true"]})
    b = write_run(tmp_path / "b", {"boolq": ["true"]}, protocol="generate v1")
    assert "different protocols (generate v1, score v1)" in report(
        read_settings([str(a), str(b)]), paper=False
    )


def test_an_evaluation_beside_the_others_has_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true", "false"]})
    b = write_run(tmp_path / "b", {"boolq": ["true", "true"]})
    other = write_run(tmp_path / "c", {"boolq": [None, "true"]}, protocol="generate v1")
    command = [f"before={a}", f"after={b}", "--beside", f"generate={other}", "--out", str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    header, boolq = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(("| accuracy", "| boolq"))
    )
    assert header == ["accuracy %", "before", "after", "− before", "generate"]
    assert boolq[1:3] == ["50.00", "100.00"] and boolq[3].startswith("+50.00 [") and boolq[4] == "50.00"
    assert "not comparable" not in text and "without a difference: generate." in text


def test_faults_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true", "true"]})
    shorter = write_run(tmp_path / "b", {"boolq": ["true"]})
    elsewhere = write_run(tmp_path / "c", {"piqa": ["true"]})
    torn = write_run(tmp_path / "d", {"boolq": ["true", "true"]})
    (torn / "predictions" / "boolq.jsonl").write_text("")
    for arguments, words in (
        ([str(a), str(shorter)], "different items of boolq"),
        ([str(a), str(elsewhere)], "no task in common"),
        ([str(tmp_path / "none")], "no results.json"),
        ([str(torn)], "0 of 2 items"),
        ([f"x={a}", f"x={a}"], "two settings are called 'x'"),
        ([f"x={a},{a}/../{a.name}"], "'x' has one evaluation twice; give a folder for each seed"),
        ([f"={a}"], "no name or no folder in"),
        (["x="], "no name or no folder in 'x='; write NAME=DIR"),
        ([f"x={a},"], "no name or no folder in"),
        ([str(a), "--papr"], "--papr"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


RESULTS: list[bytes] = [
    b"",
    b"[]",
    b"null",
    b"7",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"tasks": {"boolq": {"total": ' + b"9" * 5000 + b"}}}",
    b"{}",
    *(
        json.dumps({**ok, **change}).encode()
        for ok in [
            {
                "model": "m",
                "adapter": None,
                "protocol": "p",
                "tasks": {"boolq": {"total": 2}},
                "settings": {"prompt": "alpaca", "dtype": "float32"},
            }
        ]
        for change in [
            {"tasks": []},
            {"tasks": {}},
            {"tasks": {"boolq": 2}},
            {"tasks": {"boolq": {}}},
            {"tasks": {"boolq": {"total": "2"}}},
            {"tasks": {"boolq": {"total": 0}}},
            {"tasks": {"boolq": {"total": True}}},
            {"tasks": {"../../boolq": {"total": 2}}},
            {"settings": None},
            {"settings": {"prompt": "alpaca"}},
            {"settings": {"prompt": ["alpaca"], "dtype": "float32"}},
            {"model": None},
            {"adapter": ["a"]},
            {"protocol": 1},
        ]
    ),
]

_SOUND = {"index": 0, "prompt_hash": "h", "output": "", "prediction": "true", "answer": "true"}
PREDICTIONS: list[bytes] = [
    b"[]",
    b"3",
    b'"text"',
    b"{",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"index": ' + b"9" * 5000 + b"}",
    *(
        json.dumps({**_SOUND, **change}).encode()
        for change in [
            {"index": "0"},
            {"index": 1.5},
            {"index": -1},
            {"index": True},
            {"prediction": ["true"]},
            {"answer": None},
            {"output": 7},
            {"prompt_hash": {}},
            {"margin": "wide"},
            {"margin": float("nan")},
            {"per_token": 1},
            {"note": []},
        ]
    ),
    *(json.dumps({k: v for k, v in _SOUND.items() if k != key}).encode() for key in _SOUND),
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("results.json", content) for content in RESULTS),
        *(("predictions/boolq.jsonl", content) for content in PREDICTIONS),
    ],
)
def test_files_of_other_types_are_one_line(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true", "true"]})
    b = write_run(tmp_path / "b", {"boolq": ["true", "false"]})
    (b / name).write_bytes(content)
    assert main([str(a), str(b), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500
    assert str(b / name) in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["results.json", "predictions/boolq.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_ordinary_file_is_one_line(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true", "true"]})
    (a / name).unlink()
    if kind == "folder":
        (a / name).mkdir()
    else:
        os.mkfifo(a / name)
    assert main([str(a), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not an ordinary file" in error and str(a / name) in error


def test_names_with_marks_of_mathematics_are_drawn_as_they_are(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {"boolq": ["true"]}) for name in ("cost_$5_to_$9", "{x^$_\\frac$")]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_a_name_that_is_not_utf8_is_written_as_json_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", {"boolq": ["true"]}, adapter="caf\udce9")
    assert main([str(a), "--out", str(tmp_path / "out")]) == 0
    assert "caf\\udce9" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in capsys.readouterr().out
    write_json_atomically(tmp_path / "x.json", {"model": "caf\udce9"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"model": "caf\udce9"}


def test_names_are_no_markup_of_the_table(tmp_path: Path) -> None:
    answers: dict[str, list[str | None]] = {"boolq": ["true"] * 6}
    name = "a|b [c](d) <script> `e` $f$"
    first, second = (write_run(tmp_path / folder, answers) for folder in (name, "g"))
    text = report(read_settings([str(first), str(second)]), paper=False)
    assert "a\\|b \\[c\\](d) \\<script\\> \\`e\\` \\$f\\$" in text
    assert all(part not in text.replace("\\<", "") for part in ("<script", "a|b", " [c]"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}
