"""The progress bar: in a log, on a terminal, and where there is nothing to show."""

from __future__ import annotations

import io
import time

import pytest

from flexlora_ds.terminal import progress_bar
from flexlora_ds.terminal.progress_bar import ProgressBar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, pause: float, delayed: bool = False) -> str:
    """What a bar over 4,000 records writes that are done in two halves, with a pause before each."""
    with ProgressBar("tokenising", 4000, "records", delayed=delayed, stream=stream) as bar:
        for done in (2000, 4000):
            time.sleep(pause)
            bar.show(done)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_TERMINAL_SECONDS", 0.02)
    monkeypatch.setattr(progress_bar, "_LOG_SECONDS", 0.02)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # silences other libraries' bars


def test_a_log_gets_a_line_for_each_state() -> None:
    lines = shown(io.StringIO(), 0.05).splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        "tokenising: 0/4000 records (0 %)",
        "tokenising: 2000/4000 records (50 %)",
        "tokenising: 4000/4000 records (100 %)",
    ]
    assert all("records/s" in line and line.endswith("left") for line in lines)


def test_a_terminal_is_drawn_in_place() -> None:
    text = shown(Terminal(), 0.05)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert "tokenising: 100%" in text


def test_work_ends_with_its_last_state_even_if_it_was_quick() -> None:
    assert shown(io.StringIO(), 0.0).splitlines()[-1].startswith("tokenising: 4000/4000 records (100 %)")


def test_quick_work_shows_nothing_where_it_is_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_TERMINAL_SECONDS", 60.0)
    monkeypatch.setattr(progress_bar, "_LOG_SECONDS", 60.0)
    assert shown(io.StringIO(), 0.0, delayed=True) == shown(Terminal(), 0.0, delayed=True) == ""
