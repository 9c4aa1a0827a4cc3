"""The two kinds of failure that a command reports in one line (exit codes: the README's table)."""

from __future__ import annotations


class UserError(ValueError):
    """What the user must change: keys, options, a missing model, missing or malformed data (exit code 2)."""


class RunError(RuntimeError):
    """What failed while running: no valid checkpoint, numbers not finite, disk, lock, a lost process (exit code 1)."""
