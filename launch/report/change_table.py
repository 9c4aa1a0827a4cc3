"""The rank changes of a run as the page's table shows them, bounded in rows and names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from launch.report.history import evenly
from launch.report.numbers import number
from launch.report.run_data import OTHERS, RunData, group_by_kind, layer_label

MOST_CHANGES = 200
"""Rows of the table: of more changes, so many evenly spread."""

MOST_NAMES = 24
"""Matrices named in one cell; of the others, their number."""

_MOST_AGES = 6

Places: TypeAlias = Mapping[str, tuple[str, str]]
"""The kind and layer of a matrix, by its name."""


def change_rows(run: RunData) -> list[dict[str, Any]]:
    """One row a change."""
    with_market = any(row.get("market") for row in run.changes)
    groups = group_by_kind(run.changes[0]["ranks"] if run.changes else ())
    places = {
        name: (kind, layer_label(name, kind))
        for kind, names in groups.items()
        if kind != OTHERS
        for name in names
    }
    return [_change(row, places, with_market=with_market) for row in evenly(run.changes, MOST_CHANGES)]


def _change(row: Mapping[str, Any], places: Places, *, with_market: bool) -> dict[str, Any]:
    """`numbers` by their column's heading."""
    return {
        "step": f"{row['step']:,}",
        "size": f"{row['adjust_size']:,}",
        "pruned": _names(row["pruned"], places),
        "expanded": _names(row["expanded"], places),
        "numbers": {
            "margin": number(row["score_margin"], ".2g"),
            "age of pruned": _ages(row["prune_age"]),
            "total rank": f"{row['total_rank']:,}",
            "parameters": f"{row['trainable_params']:,}",
            "loss before → after": (
                f"{number(row['loss_before'], '.4f')} → {number(row['loss_after'], '.4f')}"
            ),
            **({"market": _market(row)} if with_market else {}),
            "λ error": number(row["spectrum_error"], ".1%"),
            "seconds": number(row["seconds"], ".2f"),
        },
    }


def _names(names: Sequence[str], places: Places) -> dict[str, Any]:
    """Layers by module kind, or whole names where there is no kind, with their counts; how many more there are."""
    counts = Counter(names)
    shown: dict[str, list[str]] = {}
    for name, count in itertools.islice(counts.items(), MOST_NAMES):
        kind, layer = places.get(name, (name, ""))
        shown.setdefault(kind, []).append(f"{layer} × {count}" if count > 1 else layer)
    kinds = {kind: ", ".join(layers) for kind, layers in sorted(shown.items())}
    return {"kinds": kinds, "more": max(0, len(counts) - MOST_NAMES)}


def _ages(ages: Sequence[int]) -> str:
    """Each with its count, or their range where they are many."""
    counts = Counter(ages)
    if len(counts) > _MOST_AGES:
        return f"{min(ages):,} to {max(ages):,}"
    return ", ".join(f"{age:,} × {n}" if n > 1 else f"{age:,}" for age, n in counts.items())


def _market(row: Mapping[str, Any]) -> str:
    """What a change traded for what, or why it traded nothing; in units of the loss."""
    market = row.get("market")
    if not market:
        return "–"
    if row["pruned"] or row["expanded"]:
        gain, loss = number(market["expected_gain"], ".2g"), number(market["expected_loss"], ".2g")
        return f"expected gain {gain} for loss {loss}"
    gains = [value for value in market["gain"].values() if value is not None]
    losses = [value for value in market["loss"].values() if value is not None]
    best, cheapest = number(max(gains, default=None), ".2g"), number(min(losses, default=None), ".2g")
    return f"traded nothing: best gain {best} against cheapest loss {cheapest}"
