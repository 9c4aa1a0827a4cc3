"""What the command line decides by itself, before torch is imported: `--help`, and options that are wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexlora_ds.terminal.command import exit_code_of, is_rank_zero
from launch.command import NOT_BEGUN, quiet_libraries
from launch.options.debug import debug_wanted
from launch.options.help import help_text
from launch.options.train_options import DEFAULT_RECIPE, parse_options


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
    """Leave where `answer` has the exit code; else keep other libraries' remarks off the run's output."""
    quiet_libraries()
    code = answer(arguments)
    if code is not None:
        sys.exit(code)
