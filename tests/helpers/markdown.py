"""The pages of the project, taken apart: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import ROOT

PROGRAMS = (
    "make",
    "python",
    "deepspeed",
    "torchrun",
    "sbatch",
    "pytest",
    "source",
    "lm_eval",
    "cp",
    ".venv/bin/pip",
)
_FENCE = re.compile(r"^ *```(\w*) *$")
_ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language (often empty), its text and the line it begins in."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page, as its words; the assignments before it and what a shell does after it are apart."""

    page: str
    text: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of docs, tests and benchmarks."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "tests" / "README.md",
        ROOT / "benchmarks" / "README.md",
    ]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines: list[str] | None = None
    language, begin = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and lines is None:
            lines, language, begin = [], fence[1], number
        elif fence and lines is not None:
            yield Block(str(page.relative_to(ROOT)), begin, language, "\n".join(lines) + "\n")
            lines = None
        elif lines is not None:
            lines.append(line)
    assert lines is None, f"{page}: a block is not closed"


def commands() -> list[Command]:
    """The commands of all blocks, in the order of the pages; those joined by && are two."""
    return [
        command
        for page in pages()
        for block in blocks(page)
        if block.language in ("", "bash")
        for line in block.text.replace("\\\n", " ").splitlines()
        for part in line.partition("  #")[0].split(" && ")
        if (command := _command(block.page, part)) is not None
    ]


def commands_in_sentences() -> list[Command]:
    """The commands that a sentence or a table names, from `python`, `deepspeed`, … on."""
    return [
        command
        for page in pages()
        for span in _SPAN.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
        if (command := _command(str(page.relative_to(ROOT)), " ".join(span.split()))) is not None
    ]


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return _LINK.findall(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a link's `#…` may name in a page: its headings, in lower case with hyphens."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _command(page: str, text: str) -> Command | None:
    try:
        words = shlex.split(text.partition(" > ")[0])
    except ValueError:  # an apostrophe: prose
        return None
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if len(words) < 2 or words[0] not in PROGRAMS:
        return None
    return Command(page, " ".join(text.split()), tuple(words))
