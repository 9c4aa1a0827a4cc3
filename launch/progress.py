"""The progress line: rewritten in place on a terminal, one line every `log_every` steps in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_SMOOTHING = 0.05  # weight of the newest step in the average that the time left is computed from
_REDRAW_SECONDS = 0.1
_CLEAR = "\r\x1b[K"


class Progress:
    """Shows steps 1 … `total`, starting after `start`; silent unless `shows` (process 0)."""

    def __init__(
        self,
        total: int,
        *,
        log_every: int = 10,
        start: int = 0,
        shows: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._log_every = log_every
        self._shows = shows
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._step = start
        self._loss: float | None = None
        self._change = ""
        self._line = ""
        self._last_time = clock()
        self._last_draw = float("-inf")
        self._step_seconds: float | None = None

    def begin(self) -> None:
        """The first step begins now: what came before it says nothing of the time left."""
        self._last_time = self._clock()

    def update(self, step: int, *, loss: float | None, tokens_per_s: float, lr: float) -> None:
        """Show step `step` as done; `loss` None keeps the last one (a run need not fetch each)."""
        self._measure(step)
        self._loss = self._loss if loss is None else loss
        self._line = self._compose(tokens_per_s, lr)
        last = step >= self._total
        if self._terminal:
            if last or self._clock() - self._last_draw >= _REDRAW_SECONDS:
                self._draw()
        elif last or step % self._log_every == 0:
            self._write(self._line + "\n")

    def rank_change(self, step: int, pruned: int, expanded: int) -> None:
        """Remember a rank change; the line shows the last one: `ranks: step 320 −4 +4`."""
        self._change = f" · ranks: step {step} −{pruned} +{expanded}"

    def message(self, text: str) -> None:
        """Print a line of its own above the progress line."""
        self._write((_CLEAR if self._terminal else "") + text + "\n")
        if self._terminal and self._line:
            self._draw()

    def close(self) -> None:
        """End the line on a terminal, so that what is printed next starts on its own."""
        if self._terminal and self._line:
            self._draw()
            self._write("\n")
            self._line = ""

    def _measure(self, step: int) -> None:
        now = self._clock()
        done = step - self._step
        if done > 0:
            seconds = (now - self._last_time) / done
            mean = self._step_seconds
            self._step_seconds = seconds if mean is None else mean + _SMOOTHING * (seconds - mean)
            self._step, self._last_time = step, now

    def _compose(self, tokens_per_s: float, lr: float) -> str:
        loss = "–" if self._loss is None else f"{self._loss:.4f}"
        left = duration((self._total - self._step) * (self._step_seconds or 0.0))
        width = len(str(self._total))
        return (
            f"step {self._step:>{width}}/{self._total} · loss {loss} · {tokens_per_s:,.0f} tokens/s · "
            f"lr {lr:.2e} · {left} left{self._change}"
        )

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns
        self._write(_CLEAR + self._line[: max(width - 1, 20)])
        self._last_draw = self._clock()

    def _write(self, text: str) -> None:
        if self._shows:
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))  # e.g. an ASCII-only log
            self._stream.flush()


def duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:03 or 3:07:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
