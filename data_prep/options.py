"""What the commands' parsers share: faults as one-line errors, text as written, checked numbers."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from data_prep.errors import DataError


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are DataErrors; a misspelt option names the nearest one."""

    def __init__(self, module: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        known = [option for action in self._actions for option in action.option_strings]
        wrong = next((w for w in message.split() if w.startswith("--") and w not in known), "")
        near = difflib.get_close_matches(wrong, known, 1)
        mend = f"did you mean {near[0]}?" if wrong and near else f"see {self.prog} --help"
        raise DataError(message, mend=mend)


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
