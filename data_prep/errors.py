"""The one kind of failure that data preparation reports to the user."""

from __future__ import annotations


class DataError(ValueError):
    """Missing or malformed data, or options that cannot be met (exit code 2 at a command's edge).

    Its text is one line: ``fault (place); mend``. `place` and `mend` may be empty.
    """

    def __init__(self, fault: str, place: str = "", mend: str = "") -> None:
        self.fault, self.place, self.mend = fault, place, mend
        super().__init__(f"{fault}{f' ({place})' if place else ''}{f'; {mend}' if mend else ''}")

    def at(self, place: str) -> DataError:
        """The same fault at a named place, for callers that know where they are."""
        return DataError(self.fault, place, self.mend)
