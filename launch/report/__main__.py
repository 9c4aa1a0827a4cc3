"""`python -m launch.report RUN`: build the report of a run again, at any time, also while the run is going on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flexlora_ds.errors import RunError, UserError
from launch.report.build import build_report


def main(argv: list[str] | None = None) -> int:
    """Build the report of the run folder named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Rebuild a run's report.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    try:
        print(build_report(arguments.run))
    except (UserError, RunError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
