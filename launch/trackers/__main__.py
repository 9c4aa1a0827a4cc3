"""`python -m launch.trackers NAME RUN`: tell a tracker what it lacks of a run; also of one that was never tracked.

A run with `track` starts it with `--follow`: it then goes on until its input ends, which it does with the run.
"""

from __future__ import annotations

import argparse
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, get_args

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.terminal.command import CommandParser, run_parsed
from launch.options.train_options import TrackerName

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
"""For a tracker of the same run that is still at work."""
_LAST_WORDS_SECONDS = 90
"""After the end of the run; longer than the run itself waits."""


def main(argv: list[str] | None = None) -> int:
    """Track the run on the command line; the exit code."""
    parser = CommandParser("python -m launch.trackers", "Tell a tracker what it lacks of a run.")
    parser.add_argument("name", choices=get_args(TrackerName))
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--follow", action="store_true", help="until standard input ends")
    parser.add_argument("--after", type=int, default=None, help="the run goes on after this step")
    return run_parsed(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    from flexlora_ds.files.lock import locked
    from launch.trackers.known import require_installed
    from launch.trackers.teller import Teller

    require_installed([arguments.name], "name")
    if arguments.follow:
        _ends_by_its_input_alone()
    elif not (arguments.run / "metrics.jsonl").exists():
        raise UserError("no run to track: metrics.jsonl is missing", str(arguments.run), "give a run folder")
    folder = arguments.run / "tracking"
    folder.mkdir(exist_ok=True)
    with locked(folder / f"{arguments.name}.lock", _refuse, patience=_PATIENCE_SECONDS):
        teller = Teller(arguments.name, arguments.run, arguments.after)
        for ended in _until_input_ends() if arguments.follow else [True]:
            teller.tell(ended=ended)
        teller.finish()


def _ends_by_its_input_alone() -> None:
    """A signal to the run and all that it started must not keep a tracker from the run's last words."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _until_input_ends() -> Iterator[bool]:
    """False every now and then, True once the input has ended; then the time is limited, whatever a library does."""
    ended = False
    while not ended:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        ended = bool(readable) and not sys.stdin.read()
        if ended:
            signal.alarm(_LAST_WORDS_SECONDS)
        yield ended


def _refuse(holder: str) -> NoReturn:
    raise RunError("another tracker of this run is still at work", holder, "wait for it")


if __name__ == "__main__":
    sys.exit(main())
