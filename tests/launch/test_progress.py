"""The progress line, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest

from launch.progress import Progress, duration


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_one_line_every_log_every_steps_and_the_last() -> None:
    log, clock = Screen(terminal=False), Clock()
    progress = Progress(25, log_every=10, stream=log, clock=clock)
    for step in range(1, 26):
        clock.now += 2.0
        progress.update(step, loss=1 / step, tokens_per_s=12_345.6, lr=3e-4)
        if step == 12:
            progress.rank_change(step, 4, 3)
    progress.close()
    assert log.getvalue().splitlines() == [
        "step 10/25 · loss 0.1000 · 12,346 tokens/s · lr 3.00e-04 · 0:30 left",
        "step 20/25 · loss 0.0500 · 12,346 tokens/s · lr 3.00e-04 · 0:10 left · ranks: step 12 −4 +3",
        "step 25/25 · loss 0.0400 · 12,346 tokens/s · lr 3.00e-04 · 0:00 left · ranks: step 12 −4 +3",
    ]


def test_a_terminal_gets_one_line_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen, clock = Screen(terminal=True), Clock()
    progress = Progress(3, stream=screen, clock=clock)
    for step in (1, 2, 3):
        clock.now += 1
        progress.update(step, loss=0.5, tokens_per_s=10, lr=1e-3)
    progress.message("warning: ranks collapse")
    progress.close()
    text = screen.getvalue()
    assert text.count("\n") == 2  # the message's and the end's
    lines = [line for line in text.replace("\n", "\r").split("\r") if line]
    assert all(len(line.replace("\x1b[K", "")) < 60 for line in lines)
    assert "\x1b[Kwarning: ranks collapse\n" in text
    assert lines[-1].startswith("\x1b[Kstep 3/3 · loss 0.5000")


def test_a_fast_run_does_not_flood_the_terminal() -> None:
    screen, clock = Screen(terminal=True), Clock()
    progress = Progress(1000, stream=screen, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.001
        progress.update(step, loss=0.5, tokens_per_s=10, lr=1e-3)
    assert 5 <= screen.getvalue().count("\r") <= 15
    assert "step 1000/1000" in screen.getvalue()


def test_the_last_loss_stays_where_a_step_has_none() -> None:
    log = Screen(terminal=False)
    progress = Progress(2, log_every=1, stream=log, clock=Clock())
    progress.update(1, loss=None, tokens_per_s=0, lr=0.0)
    progress.update(2, loss=0.25, tokens_per_s=0, lr=0.0)
    progress.update(2, loss=None, tokens_per_s=0, lr=0.0)
    losses = [line.split(" · ")[1] for line in log.getvalue().splitlines()]
    assert losses == ["loss –", "loss 0.2500", "loss 0.2500"]


def test_what_comes_before_the_first_step_is_no_step() -> None:
    log, clock = Screen(terminal=False), Clock()
    progress = Progress(11, log_every=1, stream=log, clock=clock)
    clock.now += 90.0  # a start from the gradient, a validation
    progress.begin()
    clock.now += 2.0
    progress.update(1, loss=1.0, tokens_per_s=1.0, lr=3e-4)
    assert "0:20 left" in log.getvalue()


def test_a_resumed_run_measures_its_own_steps() -> None:
    log, clock = Screen(terminal=False), Clock()
    progress = Progress(100, log_every=1, start=90, stream=log, clock=clock)
    clock.now += 3
    progress.update(91, loss=1.0, tokens_per_s=1, lr=1.0)
    assert "0:27 left" in log.getvalue()


def test_other_processes_are_silent_and_an_ascii_log_is_no_error() -> None:
    screen = Screen(terminal=False)
    silent = Progress(1, shows=False, stream=screen)
    silent.update(1, loss=1.0, tokens_per_s=1, lr=1.0)
    silent.message("x")
    silent.close()
    assert screen.getvalue() == ""
    raw = io.BytesIO()
    progress = Progress(1, stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.rank_change(1, 4, 4)
    progress.update(1, loss=1.0, tokens_per_s=1, lr=1.0)
    assert b"ranks: step 1 ?4 +4" in raw.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (723, "12:03"), (11_220, "3:07:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
