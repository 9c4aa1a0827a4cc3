"""Numbers as a report shows them."""

from __future__ import annotations


def number(value: float | None, form: str) -> str:
    """The number in this format; a dash for none."""
    return "–" if value is None else format(value, form)
