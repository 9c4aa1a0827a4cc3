"""The demo compares like with like, and prints what it showed; its steps run here on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.tasks import TASKS
from eval.__main__ import main as evaluate
from eval.compare.__main__ import main as compare
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.ownership import MARKER, claim
from launch.demo import smollm2
from launch.demo.__main__ import DEFAULT_OUT, commands, main
from launch.demo.earlier import replace_earlier
from launch.demo.evaluations import AFTER, AFTER_GENERATE, BEFORE, conclusion, print_conclusion
from launch.run_folder.lock import LOCK_FILE, one_run_in
from tests.helpers import eval_tiny

MAINS = {"eval": evaluate, "eval.compare": compare}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the demo's folder holds before its evaluations: base, data, adapter."""
    out = tmp_path / "demo"
    eval_tiny.save_base_and_adapter(out / "base", out / "adapter")
    eval_tiny.write_data(out / "data", 3)
    return out


def test_the_evaluations_are_compared_by_one_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [command for _, command in commands(run) if command[1] in MAINS]
    assert len(steps) == 4
    for _, module, *arguments in steps:
        assert MAINS[module](arguments) == 0
    results = {
        name: json.loads((run / name / "results.json").read_text())
        for name in (BEFORE, AFTER, AFTER_GENERATE)
    }
    assert [found["mode"] for found in results.values()] == ["score", "score", "generate"]
    assert [found["adapter"] is None for found in results.values()] == [True, False, False]
    capsys.readouterr()
    print((run / "comparison.md").read_text())
    print_conclusion(run)
    last_screen = capsys.readouterr().out
    assert "not comparable" not in last_screen and "− before" in last_screen
    assert last_screen.count("Shown: ") == 1
    for found in results.values():
        assert f"{100 * found['average']:.1f} %" in last_screen
    assert f"{3 * len(TASKS)} test questions" in last_screen


def test_the_conclusion_is_one_sentence_and_claims_no_more_than_there_is() -> None:
    def results(average: float) -> dict[str, Any]:
        return {"average": average, "chance": 0.4, "tasks": {"boolq": {"total": 1200}}}

    text = conclusion(results(0.41), results(0.9), results(0.88))
    assert text.startswith(
        "Shown: training raised the accuracy on 1,200 test questions from 41.0 % to 90.0 %"
    )
    assert text.count(". ") == 0 and text.endswith("88.0 % (generate).")
    assert "did not raise" in conclusion(results(0.41), results(0.41), results(0.3))


@pytest.mark.parametrize(
    "held", ["data/mine.txt", "base/mine.txt", "eval_before/mine.txt", "adapter/mine.txt", "thesis.tex"]
)
def test_a_folder_that_no_demo_wrote_is_refused_and_kept(tmp_path: Path, held: str) -> None:
    mine = tmp_path / held
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    claim(tmp_path, "run")  # nor is a training run's folder a demo's
    with pytest.raises(UserError, match="something that no demo of this version wrote"):
        replace_earlier(tmp_path, "demo")
    assert mine.read_text() == "mine"


def test_not_even_the_default_folder_is_removed_without_its_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out, demo in ((DEFAULT_OUT, "demo"), (smollm2.DEFAULT_OUT, "demo-smollm2")):
        (out / "data").mkdir(parents=True)
        with pytest.raises(UserError, match="no demo"):
            replace_earlier(out, demo)
        assert (out / "data").exists()


def test_an_earlier_demo_is_replaced_but_for_what_it_did_not_write(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    replace_earlier(out, "demo")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (out / "data").symlink_to(tmp_path / "elsewhere")
    for name in (AFTER_GENERATE, "checkpoints", "notes"):
        (out / name).mkdir()
    (out / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="demo-smollm2"):
        replace_earlier(out, "demo-smollm2")
    with one_run_in(out), pytest.raises(RunError, match="another run is writing"):
        replace_earlier(out, "demo")
    replace_earlier(out, "demo")
    assert sorted(path.name for path in out.iterdir()) == [MARKER, LOCK_FILE, "notes"]
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_a_file_in_the_place_of_the_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "not a folder" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
