"""A run of `benchmarks.gpu` beside an earlier one of the same card: what became slower, or larger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).resolve().parent.parent / "baselines"
SPEED, MEMORY = 0.15, 0.02
"""The largest losses that count as none, as fractions."""
SMALLER_IS_BETTER = {"ms": SPEED, "GB": MEMORY}
LARGER_IS_BETTER = {"tokens/s": SPEED, "items/s": SPEED}


def baseline_of(device: str) -> Path:
    """Where the figures of a card are kept: `NVIDIA H200` in `nvidia-h200.json`."""
    return BASELINES / f"{device.lower().replace(' ', '-')}.json"


def worse(figures: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each figure beyond its limit; figures that only one side has are left out."""
    known = {(row["section"], row["name"]): row for row in before if "value" in row}
    lines = []
    for row in figures:
        earlier = known.get((row["section"], row["name"]))
        if "value" not in row or earlier is None or row["unit"] != earlier["unit"]:
            continue
        lost = loss_of(row["unit"], float_of(row["value"]), float_of(earlier["value"]))
        limit = SMALLER_IS_BETTER.get(row["unit"], LARGER_IS_BETTER.get(row["unit"], 0.0))
        if lost is not None and lost > limit:
            lines.append(
                f"{row['section']}: {row['name']}: {row['value']:,.4g} {row['unit']} after {earlier['value']:,.4g}, "
                f"{lost:.0%} worse (limit {limit:.0%})"
            )
    return lines


def loss_of(unit: str, now: float | None, then: float | None) -> float | None:
    """How much worse, as a fraction of what it was; None for figures that are neither speed nor memory."""
    if not now or not then:
        return None
    if unit in SMALLER_IS_BETTER:
        return now / then - 1
    return 1 - now / then if unit in LARGER_IS_BETTER else None


def float_of(value: Any) -> float | None:
    """A number as a float; None for text and for yes or no."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The figures of a JSON file that `benchmarks.gpu --json` wrote."""
    figures: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures
