"""`python -m eval`: the command's edge. Faults become one line on stderr and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from data_prep.errors import DataError
from eval.options import parse_options
from eval.run import evaluate
from eval.workers import Team
from flexlora_ds.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for what the user must change; 1 for what failed; 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    team = Team()
    team.follow_launcher()
    try:
        evaluate(parse_options(arguments), team)
    except (UserError, DataError) as error:
        return _fail(error, 2, team, arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the edge: whatever failed, the user reads one line
        return _fail(error, 1, team, arguments)
    return 0


def _fail(error: Exception, code: int, team: Team, arguments: Sequence[str]) -> int:
    """Before the work starts all processes meet the same fault of the user's: the leading one tells it."""
    if _wants_traceback(arguments):
        traceback.print_exception(error)
    if team.is_rank_zero or team.started or code == 1:
        text = " ".join(str(error).split())
        known = isinstance(error, (UserError, DataError)) or type(error).__name__ == "RunError"
        fault = text if known else f"{type(error).__name__}: {text[:500]}; --debug shows where"
        print(f"error: {fault}", file=sys.stderr)
    return code


def _wants_traceback(arguments: Sequence[str]) -> bool:
    text = " ".join([*arguments, "--"])
    return "--debug=true " in text or "--debug true " in text or "--debug --" in text


if __name__ == "__main__":
    sys.exit(main())
