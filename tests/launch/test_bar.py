"""The bar of work before training: in a log, on a terminal, and where there is nothing to show."""

from __future__ import annotations

import io

from launch.data.bar import Bar


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, seconds: list[float]) -> str:
    """What a bar over four things writes that are done at these times."""
    clock = Clock()
    bar = Bar("tokenising", 4000, stream=stream, clock=clock)
    for done, clock.now in zip(range(1000, 5000, 1000), seconds, strict=True):
        bar.show(done)
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then_and_the_end() -> None:
    assert shown(io.StringIO(), [1, 11, 12, 13]) == (
        "tokenising: 2,000 of 4,000 (50 %)\ntokenising: 4,000 of 4,000 (100 %)\n"
    )


def test_a_terminal_is_drawn_in_place() -> None:
    text = shown(Terminal(), [1, 1.1, 2, 3])
    drawn = text.split("\r\x1b[K")
    assert len(drawn) == 4 and text.count("\n") == 1 and text.endswith("(100 %)\n")
    assert drawn[2].startswith("[" + "#" * 22 + "." * 8 + "] tokenising: 3,000 of 4,000 (75 %)")


def test_quick_work_shows_nothing() -> None:
    assert shown(io.StringIO(), [1, 2, 3, 4]) == shown(Terminal(), [0, 0.1, 0.1, 0.1]) == ""
