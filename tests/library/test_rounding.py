"""Rounding up to whole numbers."""

from __future__ import annotations

import pytest

from flexlora_ds.rounding import ceil_div, round_up


@pytest.mark.parametrize(
    ("amount", "size", "parts"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2), (5, 1, 5)]
)
def test_rounding_up(amount: int, size: int, parts: int) -> None:
    assert ceil_div(amount, size) == parts
    assert round_up(amount, size) == parts * size
