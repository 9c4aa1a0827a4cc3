"""What a command reports in one line: the fault, its place, its remedy, and the exit code that goes with it."""

from __future__ import annotations

from typing import ClassVar, TypeVar

E = TypeVar("E", bound="CommandError")


class CommandError(Exception):
    """A failure that is reported in one line: ``fault (place); remedy``.

    Args:
        fault: what is wrong; the whole line, where nothing else is given.
        place: the file, key or record number.
        mend: what to do about it.
    """

    exit_code: ClassVar[int] = 1
    said_here: bool | None = None
    """Whether this process reports it; None: the command decides."""

    def __init__(self, fault: str, place: str = "", mend: str = "") -> None:
        self.fault, self.place, self.mend = fault, place, mend
        super().__init__(fault, place, mend)

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.fault}{place}{f'; {self.mend}' if self.mend else ''}"

    def at(self: E, place: str) -> E:
        """The same fault at a named place, for callers that know where they are."""
        return type(self)(self.fault, place, self.mend)


class UserError(CommandError, ValueError):
    """What the user must change: keys, options, a missing model, missing or malformed data."""

    exit_code = 2


class RunError(CommandError, RuntimeError):
    """What failed while running: no valid checkpoint, numbers not finite, disk, lock, a lost process."""
