"""`python -m eval`: the command. How it ends: `flexlora_ds.command`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eval.options import parse_options
from eval.run import evaluate
from eval.workers import Team
from flexlora_ds.command import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, as `exit_code_of`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    team = Team()
    team.follow_launcher()

    def speaks(code: int) -> bool:
        """Before the work starts all processes find the same error of the user's: rank 0 reports it."""
        return team.is_rank_zero or team.started or code == 1

    return exit_code_of(lambda: evaluate(parse_options(arguments), team), arguments, speaks=speaks)


if __name__ == "__main__":
    sys.exit(main())
