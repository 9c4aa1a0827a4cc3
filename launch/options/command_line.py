"""What the command line decides by itself, before torch is imported: `--help`, and options that are wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from launch.command import debug_wanted, guarded, quiet_libraries
from launch.options.help import help_text
from launch.options.train_options import DEFAULT_RECIPE, parse_options


def answer(arguments: Sequence[str]) -> int | None:
    """Print the help, or what is wrong with the options; the exit code, None where there is a run to begin."""
    if "--help" in arguments or "-h" in arguments:
        if _is_rank_zero():
            print(help_text(), end="")
        return 0
    return guarded(lambda: _check(arguments), debug=lambda: debug_wanted(arguments, DEFAULT_RECIPE)) or None


def leave_early(arguments: Sequence[str]) -> None:
    """Leave where `answer` has the exit code; else make ready for the imports of a run, which take seconds.

    Other libraries' remarks are kept off the run's output, and Ctrl-C meanwhile ends the process with one line.
    """
    quiet_libraries()
    code = answer(arguments)
    if code is not None:
        sys.exit(code)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, _interrupted)


def _check(arguments: Sequence[str]) -> None:
    parse_options(arguments)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _is_rank_zero():
        print("error: interrupted before training began; start again", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"
