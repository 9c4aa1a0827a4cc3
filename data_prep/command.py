"""Where the commands of data preparation end: one line on stderr for what went wrong, and an exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from data_prep.errors import DataError

_STOPPED = 128  # plus the signal's number, as shells have it


class _StopRequest(BaseException):
    """SIGTERM, raised where the program is: what is half done gets undone on the way out."""


def command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse and run; the exit code: 0, 2 for what the user must change, 1 for what failed, 128 + signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        run(parser.parse_args(arguments))
    except (DataError, OSError) as error:
        if "--debug" in arguments:
            raise
        return _leave(str(error), 2 if isinstance(error, DataError) else 1)
    except (KeyboardInterrupt, _StopRequest) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        return _leave(
            "interrupted; no file is half-written, start again",
            _STOPPED + number,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _leave(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> None:
    raise _StopRequest
