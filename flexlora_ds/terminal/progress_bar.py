"""A progress bar for work that is counted: drawn in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0  # between two drawings
_TERMINAL = (
    "{desc}: {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
)
_LOG = "{desc}: {n_fmt}/{total_fmt}{unit} ({percentage:.0f} %), {rate_noinv_fmt}, {remaining} left"


class ProgressBar:
    """Shows how many of `total` things are done, how fast, and the time left; on stderr unless `stream` is given.

    With `delayed`, work that ends before a drawing is due shows nothing; without `shows`, nothing is ever shown.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        delayed: bool = False,
        shows: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own: processes may fork later
        output = sys.stderr if stream is None else stream
        terminal = output.isatty()
        seconds = _TERMINAL_SECONDS if terminal else _LOG_SECONDS
        self._bar = tqdm(
            desc=title,
            total=total,
            unit=f" {unit}",
            file=output if terminal else _Lines(output),
            bar_format=_TERMINAL if terminal else _LOG,
            mininterval=seconds,
            miniters=1,
            delay=seconds if delayed else 0,
            dynamic_ncols=terminal,
            disable=not shows,  # given, so that TQDM_DISABLE silences other libraries' bars only
        )

    def show(self, done: int) -> None:
        """Count `done` things in all as done."""
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Draw the last state, if there is one to see, and end the line."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lines:
    """A log for tqdm: each count on a line of its own, once, instead of over the one before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._count = ""
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        line = text.strip()
        count = line.partition(", ")[0]
        if line and count != self._count:  # tqdm draws the last one twice
            self._count = count
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
