"""The home directory where no shell has put it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexlora_ds.home import at_home
from flexlora_ds.terminal.command import CommandParser


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "text", ["a/~/b", "meta/~", " ~/a", "~nobody-of-this-name/a", "~a\0b", "~\ud800/a", ""]
)
def test_what_names_no_home_stays(text: str) -> None:
    assert at_home(text) == text


def test_a_parser_reads_the_sign_as_a_shell_does(home: Path) -> None:
    parser = CommandParser("x", None)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    for words in (["~/a", "b", "--out", "~/c"], ["--out=~/c", "~/a", "b"]):
        given = parser.parse_args(words)
        assert (given.out, given.runs) == (home / "c", [home / "a", Path("b")])
    assert parser.parse_args(["name=~/a"]).runs == [Path("name=~/a")]  # may be a folder's own name
