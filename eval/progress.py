"""The progress line on stderr: items done, items/s, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Rewrites one line on a terminal, writes a line every ten seconds elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._start = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def show(self, done: int) -> None:
        """Show the state if it is time to."""
        now = time.monotonic()
        if done < self._total and now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown = now
        rate = done / max(now - self._start, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        text = f"{done:,}/{self._total:,} items, {rate:.1f} items/s, {_clock(left)} left"
        end = "\n" if not self._terminal or done >= self._total else ""
        self._stream.write(("\r\033[K" if self._terminal else "") + text + end)
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
