"""`python -m launch.report RUN`: build the report of a run again, at any time, also while the run is going on."""

from __future__ import annotations

import sys
from pathlib import Path

from flexlora_ds.command import CommandParser, run_parsed
from launch.report.build import build_report


def main(argv: list[str] | None = None) -> int:
    """Build the report of the run folder named on the command line; return the exit code."""
    parser = CommandParser("python -m launch.report", "Rebuild a run's report.")
    parser.add_argument("run", type=Path, help="the run folder")
    return run_parsed(parser, lambda arguments: print(build_report(arguments.run)), argv)


if __name__ == "__main__":
    sys.exit(main())
