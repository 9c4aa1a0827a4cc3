"""Regular expressions from outside: what is wrong with one, and which names it matches, within bounds.

What a pattern costs cannot be told from its text, and `re` cannot be stopped. So they are tried in a process of their
own, which the kernel ends when it has had its time or memory. Ordinary patterns need a hundredth of a second there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence

from flexlora_ds.errors import UserError

CPU_SECONDS = 2
"""Of computing, not of waiting, so that a busy machine gives the same answer."""
_MEMORY = 1 << 30  # bytes
_MATCH = """
import json, re, resource, sys

patterns, names, seconds, memory = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([[i for i, name in enumerate(names) if one.fullmatch(name)] for one in compiled], sys.stdout)
"""


def pattern_fault(pattern: str) -> str | None:
    """Why a text is no regular expression; None where it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on what later versions of Python may read otherwise
            re.compile(pattern)
    except RecursionError:
        return "it is nested too deeply"
    except (re.error, ValueError, OverflowError) as error:
        return str(error)
    return None


def full_matches(patterns: Sequence[str], names: Sequence[str], place: str) -> list[list[str]]:
    """For each regular expression, the names that it matches whole, in the order of `names`.

    Raises:
        UserError: a text is no regular expression, or they are not done within `CPU_SECONDS` or 1 GiB; `place` says
            where they stand.
    """
    if not patterns:
        return []
    for pattern in patterns:
        if fault := pattern_fault(pattern):
            raise UserError(f"{_quoted(pattern)} is no regular expression: {fault}", place, "correct it")
    asked = json.dumps([list(patterns), list(names), CPU_SECONDS, _MEMORY])
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH]
    ended = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        all_of_them = ", ".join(map(_quoted, patterns[:3]))
        raise UserError(
            f"not matched within {CPU_SECONDS} s of computing and 1 GiB: {all_of_them}",
            place,
            "write a regular expression without nested repetitions, or plain names",
        )
    return [[names[i] for i in hits] for hits in json.loads(ended.stdout)]


def _quoted(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 100 else f"{pattern[:97]}...")
