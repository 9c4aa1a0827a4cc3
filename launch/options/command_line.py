"""What the command line decides by itself, before torch is imported: `--help`, and options that are wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from flexlora_ds.command import exit_code_of, is_rank_zero
from launch.command import quiet_libraries
from launch.options.debug import debug_wanted
from launch.options.help import help_text
from launch.options.train_options import DEFAULT_RECIPE, parse_options

NOT_BEGUN = "training had not begun, start again"
"""What is said after Ctrl-C before the run listens to signals."""


def answer(arguments: Sequence[str]) -> int | None:
    """Print the help, or what is wrong with the options; the exit code, None where there is a run to begin."""
    if "--help" in arguments or "-h" in arguments:
        if is_rank_zero():
            print(help_text(), end="")
        return 0
    code = exit_code_of(
        lambda: parse_options(arguments),
        debug=lambda: debug_wanted(arguments, DEFAULT_RECIPE),
        interrupted=NOT_BEGUN,
    )
    return code or None


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


def _interrupted(number: int, frame: FrameType | None) -> None:
    if is_rank_zero():
        print(f"error: interrupted; {NOT_BEGUN}", file=sys.stderr, flush=True)
    os._exit(128 + number)
