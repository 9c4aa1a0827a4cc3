"""Markdown tables that also read well in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """A table whose columns line up, with a final newline.

    Every row has as many cells as the header. The columns whose numbers (from 0) are in `left` are aligned on the
    left, all others on the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def aligned(row: Sequence[str]) -> list[str]:
        return [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]

    rules = [
        "-" * (width + 2) if column in left else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines = [markdown_row(aligned(header)), f"|{'|'.join(rules)}|", *(markdown_row(aligned(r)) for r in rows)]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table, without a newline: for a table that is printed as its rows come."""
    return f"| {' | '.join(cells)} |"
