"""Whole numbers rounded up."""

from __future__ import annotations


def ceil_div(amount: int, size: int) -> int:
    """The least number of parts of `size` (above 0) that hold `amount`."""
    return -(-amount // size)


def round_up(amount: int, multiple: int) -> int:
    """The least multiple of `multiple` (above 0) that is not below `amount`."""
    return ceil_div(amount, multiple) * multiple
