"""`python -m eval`: the command. How it ends: `flexlora_ds.terminal.command`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.options import parse_options
from flexlora_ds.terminal.command import exit_code_of, is_rank_zero

if TYPE_CHECKING:
    from eval.workers import Team


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, as `exit_code_of`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    team: Team | None = None

    def run() -> None:
        nonlocal team
        options = parse_options(arguments)
        # Only now torch is imported: --help and wrong options answer at once.
        from eval.run import evaluate
        from eval.workers import Team

        team = Team()
        team.follow_launcher()
        evaluate(options, team)

    def speaks(code: int) -> bool:
        """Before the work starts all find the same error of the user's, and Ctrl-C ends all: rank 0 reports these."""
        return is_rank_zero() or code == 1 or (code == 2 and team is not None and team.started)

    return exit_code_of(run, arguments, speaks=speaks)


if __name__ == "__main__":
    sys.exit(main())
