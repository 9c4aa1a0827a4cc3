"""Words per sentence of README, CONTRIBUTING and every page of docs, as a table.

    python -m tools.sentence_length [FILE ...]

Prose is counted: paragraphs and list items. Headings, tables, code blocks and formulas are not. A span of code counts
as one word. Exit code 1 where a page's average is above twenty.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

AT_MOST = 20
"""Words per sentence that a page may have on average."""

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^ *(```|~~~)")
_NOT_PROSE = re.compile(r"^ *(#|\||<|!\[)|^ *[-=]{3,}$")
_ITEM = re.compile(r"^ *([-*]|\d+\.) +")
_CODE = re.compile(r"`[^`]*`")
_RUN_IN = re.compile(r"^\*\*(\S+ ){0,2}\S+[.:]\*\* +")
"""A heading of at most three words at the beginning of a paragraph: no sentence."""
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])[)*_\"']*\s+(?=[A-Z0-9`*(\"'Δ])")
_SHORT = re.compile(r"\b(e\.g|i\.e|cf|vs|Eq|Eqs|No|al)\.")


def pages() -> list[Path]:
    """README, CONTRIBUTING and the pages of docs, in the order of the table."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def paragraphs(text: str) -> Iterator[str]:
    """Yield each paragraph and each list item of a Markdown text as one line; no code, tables or headings."""
    lines: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        fence = bool(_FENCE.match(line))
        code = fence or fenced
        fenced ^= fence
        item = None if code else _ITEM.match(line)
        # An indented line goes on with a list item where one is open; else it is a formula.
        formula = line.startswith("    ") and not lines and not item
        other = code or formula or not line.strip() or bool(_NOT_PROSE.match(line))
        if (other or item) and lines:
            yield " ".join(lines)
            lines = []
        if item or not other:
            lines.append(line[item.end() :].strip() if item else line.strip())


def sentences(paragraph: str) -> list[str]:
    """Cut one paragraph into its sentences; code becomes one word, a link its text."""
    plain = _RUN_IN.sub("", _LINK.sub(r"\1", _CODE.sub("Code", paragraph)))
    plain = _SHORT.sub(r"\1", plain)
    return [sentence for sentence in _END.split(plain) if words(sentence)]


def words(sentence: str) -> int:
    """Count the words of a sentence: what holds a letter or a digit."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def lengths(text: str) -> list[int]:
    """Return the number of words of each sentence of a page."""
    return [words(sentence) for paragraph in paragraphs(text) for sentence in sentences(paragraph)]


def main(argv: Sequence[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser("python -m tools.sentence_length", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="pages (default: all)")
    too_long = False
    files = parser.parse_args(argv).files
    print(f"{'page':<28}{'sentences':>10}{'average':>9}{'longest':>9}")
    for path in files or pages():
        counts = lengths(path.read_text(encoding="utf-8"))
        average = sum(counts) / max(1, len(counts))
        too_long |= average > AT_MOST
        name = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
        print(f"{name!s:<28}{len(counts):>10}{average:>9.1f}{max(counts, default=0):>9}")
    return int(too_long)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
