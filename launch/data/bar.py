"""A bar for work before training: drawn on a terminal; in a log, a line now and then if it takes long."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0  # between two drawings
_WIDTH = 30


class Bar:
    """Shows how many of `total` things are done; work that ends sooner than a drawing is due shows nothing."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total = title, total
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._every = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._drawn = clock()
        self._begun = False

    def show(self, done: int) -> None:
        """Draw it where that is due, and at the end where it was drawn before."""
        last = done >= self._total
        if self._clock() - self._drawn < self._every and not (last and self._begun):
            return
        self._drawn, self._begun = self._clock(), True
        text = f"{self._title}: {done:,} of {self._total:,} ({100 * done // self._total} %)"
        if not self._terminal:
            self._stream.write(text + "\n")
        else:
            filled = _WIDTH * done // self._total
            line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}"
            width = max(20, shutil.get_terminal_size().columns - 1)
            self._stream.write("\r\x1b[K" + line[:width] + ("\n" if last else ""))
        self._stream.flush()
