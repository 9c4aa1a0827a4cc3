"""Every command ends alike: bad input is one line on stderr, with an exit code, and a traceback on request only."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora_ds.errors import CommandError, RunError, UserError
from flexlora_ds.terminal.command import CommandParser, debug_asked, exit_code_of, run_parsed

WRONG = {
    "launch.train": (["--rnk", "3"], "unknown key --rnk (command line); did you mean rank?"),
    "launch.report": (["no_such_run"], "no_such_run"),
    "launch.demo": (["--ot", "x"], "unknown option '--ot' (command line); did you mean --out?"),
    "launch.demo.smollm2": (["--limit", "few"], "invalid int value: 'few' (command line); see python -m"),
    "launch.demo.base_model": (["--step", "1"], "did you mean --steps?"),
    "data_prep.__main__": (["--tasks", "boolqq"], "did you mean boolq?"),
    "data_prep.report.__main__": (["--data", "no_such_folder"], "no such folder (no_such_folder); build it"),
    "eval.__main__": (["--model", "m", "--task", "boolq"], "did you mean --tasks?"),
    "eval.compare.__main__": (["no_such_run"], "no_such_run"),
    "flexlora_ds.export": (["--run", "no_such_run", "--to", "peft", "--out", "x"], "no_such_run"),
    "benchmarks.rank_change": (["--stages", "4"], "'4' is no whole number of 0 to 3 (command line)"),
    "benchmarks.gpu.__main__": (["--sections", "nothing"], "there is no 'nothing'"),
    "benchmarks.learning.__main__": (["--settings", "nothing"], "no 'nothing'"),
    "benchmarks.sizes.__main__": (["--setting", "LoRA"], "invalid choice: 'LoRA'"),
    "benchmarks.same_loss": (["--rnk", "3"], "did you mean rank?"),
    "benchmarks.saving_cost": (["--pairs", "few"], "invalid int value: 'few'"),
    "benchmarks.training": (["--contenders", "nobody"], "no 'nobody'"),
    "benchmarks.dropout": (["--rows", "wide"], "invalid int value: 'wide'"),
    "benchmarks.eval_speed": (["--model", "m", "--mode", "guess"], "invalid choice: 'guess'"),
}
"""A command line of each command that the user must change, and a part of the one line that says so."""


def call(module: str) -> Callable[[], int]:
    name = {"launch.report": "launch.report.__main__", "launch.demo": "launch.demo.__main__"}.get(
        module, module
    )
    main: Callable[[], int] = importlib.import_module(name).main
    return main


@pytest.mark.parametrize("module", WRONG)
@pytest.mark.parametrize("debug", [[], ["--debug", "true"], ["--debug=false"]])
def test_bad_input_is_one_line_and_exit_code_2(
    module: str,
    debug: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, said = WRONG[module]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, *words, *debug])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert call(module)() == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and said in error.splitlines()[-1], error
    assert ("Traceback" in error) == (debug == ["--debug", "true"])
    assert debug == ["--debug", "true"] or error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def broken(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad rank", "key rank", "give 1 or more"), 2, "bad rank (key rank); give 1 or more"),
        (UserError("bad rank"), 2, "bad rank"),
        (RunError("no checkpoint", mend="begin anew"), 1, "no checkpoint; begin anew"),
        (RunError("two\nlines"), 1, "two lines"),
        (OSError(28, "No space left on device", "/x/y"), 1, "No space left on device (/x/y)"),
        (OSError("nothing known"), 1, "nothing known (input or output)"),
        (KeyError("x"), 1, "KeyError: 'x' (test_commands.py, line "),
        (KeyboardInterrupt(), 130, "interrupted; start again"),
    ],
)
def test_an_error_has_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(broken(error), []) == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1


def test_the_first_process_reports_what_all_meet_and_each_what_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code_of(broken(UserError("all meet it")), []) == 2
    assert capsys.readouterr().err == ""
    assert exit_code_of(broken(ZeroDivisionError("one meets it")), []) == 1
    assert "ZeroDivisionError: one meets it" in capsys.readouterr().err


def test_sigterm_undoes_what_is_half_done(capsys: pytest.CaptureFixture[str]) -> None:
    undone = []

    def body() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            undone.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code_of(body, [], stoppable=True) == 143
    assert undone and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "error: interrupted; start again\n"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], False),
        (["--debug"], True),
        (["--debug", "true"], True),
        (["--debug=true"], True),
        (["--debug", "--out", "x"], True),
        (["--debug", "false"], False),
        (["--debug=false"], False),
        (["--debug", "--debug", "false"], False),
        (["--debug", "maybe"], False),
    ],
)
def test_debug_is_found_on_any_command_line(words: list[str], asked: bool) -> None:
    assert debug_asked(words) == asked


def test_debug_may_stand_before_a_positional_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser("python -m x", None)
    parser.add_argument("run")
    assert run_parsed(parser, lambda given: print(given.run, given.debug), ["--debug", "runs/x"]) == 0
    assert capsys.readouterr().out == "runs/x True\n"


@pytest.mark.parametrize("words", [[], ["--debug"], ["--out", "there"], ["--out", "there", "--debug"]])
def test_a_command_without_words_runs_with_its_defaults(words: list[str]) -> None:
    parser = CommandParser("command", None)
    parser.add_argument("--out", default="here")
    seen = []
    assert run_parsed(parser, lambda arguments: seen.append((arguments.out, arguments.debug)), words) == 0
    assert seen == [("there" if "there" in words else "here", "--debug" in words)]


def test_a_place_is_given_by_who_knows_it() -> None:
    error: CommandError = UserError("'answer' is missing", mend="add it").at("a.json, record 3")
    assert isinstance(error, UserError) and str(error) == "'answer' is missing (a.json, record 3); add it"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nerror: forged", "a error: forged"),
        ("a\r\x1b[31mred\x0b\x85b", "a \\x1b[31mred b"),
        ("lone \udc80 surrogate", "lone \\udc80 surrogate"),
        ("λ = 0.5; ΔW, 中文", "λ = 0.5; ΔW, 中文"),
        ("x" * 3_000 + "; do this", "x" * 1_000 + " … " + "x" * 991 + "; do this"),
    ],
    ids=["line feed", "terminal codes", "surrogate", "letters", "long"],
)
def test_whatever_a_value_holds_an_error_is_one_plain_line(
    text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise UserError(text)

    assert exit_code_of(run, []) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
