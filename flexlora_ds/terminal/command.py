"""How any command of ours ends: an error becomes one line on stderr and an exit code. Imports no torch.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the user must change something: `UserError` |
| 1 | something failed: `RunError`, the disk, or what nobody foresaw |
| 130, 143 | Ctrl-C, SIGTERM |
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flexlora_ds.errors import CommandError, RunError, UserError
from flexlora_ds.home import at_home
from flexlora_ds.terminal.plain_text import NO_GLYPH
from flexlora_ds.terminal.plain_text import one_line as one_line

_SIGNALLED = 128
"""Plus the signal's number, as shells have it."""
_LONGEST_TEXT = 500
"""Characters of a foreign error's text in our line."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose faults are UserErrors, and which knows `--debug [true|false]`.

    The nearest option is named for a misspelt one. A `~` behind `--option=` is the home directory, as one that stands
    alone is to a shell. `--help` shows the description and the epilog as they are written.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--debug",
            type=boolean,
            nargs="?",
            const=True,
            default=False,
            help="show the traceback of an error",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's; an unknown option is a UserError that names the nearest known one."""
        given: argparse.Namespace
        words = sys.argv[1:] if args is None else args
        given, unknown = self.parse_known_args([_at_home(word) for word in words], namespace)
        if unknown:
            self.refuse(unknown[0])
        return given

    def with_debug_value(self, words: Sequence[str]) -> list[str]:
        """The command line with `--debug=true` for a `--debug` that stands before a positional argument."""
        positional = any(not action.option_strings for action in self._actions)
        return [
            "--debug=true"
            if positional and word == "--debug" and following not in ("true", "false")
            else word
            for word, following in zip(words, [*words, ""][1:], strict=True)
        ]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UserError(message, "command line", f"see {self.prog} --help")

    def refuse(self, word: str) -> NoReturn:
        """Raise the UserError for a word that is no option."""
        known = [
            name
            for action in self._actions
            for name in action.option_strings
            if action.help != argparse.SUPPRESS
        ]
        near = difflib.get_close_matches(word.partition("=")[0], known, 1, cutoff=0.4)
        raise UserError(
            f"unknown option {word!r}",
            "command line",
            f"did you mean {near[0]}?" if near else f"see {self.prog} --help",
        )


def _at_home(word: str) -> str:
    """A word of a command line, with the home directory for a `~` at its start or behind its first `=`."""
    name, equals, value = word.partition("=")
    return f"{name}={at_home(value)}" if equals and name.startswith("--") else at_home(word)


def boolean(text: str) -> bool:
    """`true` or `false`, for `type=`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def debug_asked(arguments: Sequence[str]) -> bool:
    """Whether a command line says `--debug`, `--debug true` or `--debug=true`, even where the rest of it is wrong."""
    words = [word for argument in arguments for word in argument.split("=", 1)] + ["--"]
    if "--debug" not in words:
        return False
    following = words[len(words) - words[::-1].index("--debug")]
    return following.startswith("-") or following.lower() == "true"


def is_rank_zero() -> bool:
    """Whether the launcher's environment says that this is process 0, or names no process of the run."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    named = rank.isdecimal() and world.isdecimal() and len(rank + world) < 20 and int(rank) < int(world)
    return not named or int(rank) == 0


def run_parsed(
    parser: CommandParser, run: Callable[[argparse.Namespace], object], argv: Sequence[str] | None, **how: Any
) -> int:
    """Parse a command line (None: this process's) and run; the exit code, as `exit_code_of`, which gets `how`."""
    arguments = parser.with_debug_value(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_GLYPH)
        return exit_code_of(lambda: run(parser.parse_args(arguments)), arguments, **how)


def exit_code_of(
    run: Callable[[], object],
    arguments: Sequence[str] | None = None,
    *,
    debug: Callable[[], bool] | None = None,
    speaks: Callable[[int], bool] = lambda code: is_rank_zero(),
    interrupted: str = "start again",
    stoppable: bool = False,
) -> int:
    """Run a command's body and report what went wrong; the command's exit code.

    Args:
        arguments: the command line, for `debug`; None: this process's.
        debug: whether an error's traceback is wanted, asked once there is one; None: as the command line says.
        speaks: whether this process reports an error of the exit code given. What nobody foresaw every process
            reports, as it may have happened in one alone.
        interrupted: what to do after Ctrl-C or SIGTERM.
        stoppable: SIGTERM is raised where the program is, so that what is half done is undone on the way out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr is: a file's name may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _raised_sigterm() if stoppable else contextlib.nullcontext():
            run()
    except Exception as error:
        reported = reported_error(error)
        if debug_asked(sys.argv[1:] if arguments is None else arguments) if debug is None else debug():
            traceback.print_exception(error)
        said_here = reported.said_here
        if (speaks(reported.exit_code) if said_here is None else said_here) or not _is_foreseen(error):
            print("error:", one_line(str(reported)), file=sys.stderr, flush=True)
        return reported.exit_code
    except (KeyboardInterrupt, _Terminated) as stop:
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        if speaks(_SIGNALLED + number):
            print(f"error: interrupted; {interrupted}", file=sys.stderr, flush=True)
        return _SIGNALLED + number
    return 0


def reported_error(error: Exception) -> CommandError:
    """An error as one of ours, in one line."""
    if isinstance(error, CommandError):
        return error
    if isinstance(error, OSError):
        return RunError(error.strerror or _one_line(error), str(error.filename or "input or output"))
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f"{Path(last[0].filename).name}, line {last[0].lineno}" if last else ""
    return RunError(f"{type(error).__name__}: {_one_line(error)}", place, "--debug true shows where")


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, (CommandError, OSError))


def _one_line(error: Exception) -> str:
    return one_line(str(error), _LONGEST_TEXT) or "no text"


class _Terminated(BaseException):
    """SIGTERM, raised where the program is."""


@contextlib.contextmanager
def _raised_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
