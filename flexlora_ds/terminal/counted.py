"""A number with the word for what it counts."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """`1 batch`, `1,200 batches`; without `many` an s is put behind `one`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
