"""A user's text, such as a folder's name, where something would read it as markup or code: taken as it is."""

from __future__ import annotations

import re
import shlex

PLOT_TEXT = {"text.parse_math": False, "text.usetex": False}
"""Settings of matplotlib under which no text is mathematics."""

NO_GLYPH = "Glyph .* missing from"
"""How matplotlib begins a remark on a sign that its font lacks; it draws a box, and a folder's name may hold any."""

_LONGEST = 120  # characters
_MARKUP = re.compile(r"[\\`*\[\]<>|$~&!#]|(?<!\w)_|_(?!\w)")


def one_line(text: str, longest: int = 2_000) -> str:
    """Text as one line for a terminal: line feeds become spaces, control characters and surrogates escapes.

    Of what is longer than `longest` characters the middle is left out, so that fault and remedy both stay.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def printable(text: str) -> str:
    """One line without control characters or surrogates, the middle left out of what is very long."""
    return one_line(text, _LONGEST)


def markdown_text(text: str) -> str:
    """Text as Markdown that shows it as it is, in a line or a table's cell."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def legend_label(text: str) -> str:
    """Text as a label that matplotlib shows; it hides those that begin with an underscore."""
    return f" {printable(text)}" if text.startswith("_") else printable(text)


def python_command(code: str, *arguments: object) -> str:
    """A shell's command that runs `code` with `sys.argv[1:]`: no name among the arguments is code or a shell's word."""
    return f'python -c "{code}" {shlex.join(map(str, arguments))}'
