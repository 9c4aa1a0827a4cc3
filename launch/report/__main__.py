"""`python -m launch.report RUN`: build the report of a run again, at any time, also while the run is going on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexlora_ds.terminal.command import CommandParser, run_parsed


def main(argv: list[str] | None = None) -> int:
    """Build the report of the run folder named on the command line; return the exit code."""
    parser = CommandParser("python -m launch.report", "Write a run's report again, also while it runs.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="RUN", help="other runs, for the table of costs"
    )
    return run_parsed(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    from launch.report.build import build_report  # draws with matplotlib, which --help does not wait for

    print(build_report(arguments.run, arguments.beside))


if __name__ == "__main__":
    sys.exit(main())
