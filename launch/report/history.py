"""Every matrix's rank and score after each change, bounded in size: what the page's script and tables show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from launch.report.run_data import RunData, group_by_kind, layer_label

MOST_MATRICES = 4_000
"""Matrices of a page at most: the first in the model's order."""

MOST_CELLS = 60_000
"""Ranks of a page at most, each with a score of a few characters: half a megabyte."""

T = TypeVar("T")


@dataclass(frozen=True)
class MatrixHistory:
    """One matrix over the steps of its `History`."""

    name: str
    label: str
    """What distinguishes it from the others of its kind: its layer."""
    ranks: Sequence[int]
    scores: Sequence[float | None]
    """The score before each change; None at the start, and where it is not finite."""


@dataclass(frozen=True)
class History:
    """The ranks of a run, by module kind."""

    steps: Sequence[int]
    """0, and the steps of the changes."""
    score: str
    """What the scores are: the option `importance`."""
    kinds: dict[str, list[MatrixHistory]]
    note: str
    """What was left out; empty where nothing was."""

    @property
    def matrices(self) -> Iterator[MatrixHistory]:
        """All of them, in the order of the page's data."""
        return itertools.chain.from_iterable(self.kinds.values())

    @property
    def uniform_rank(self) -> int | None:
        """The rank that every matrix has all the time; None where ranks differ."""
        ranks = {rank for matrix in self.matrices for rank in matrix.ranks}
        return ranks.pop() if len(ranks) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """For the page's script; every number is finite."""
        kinds = [
            {"name": kind, "rows": [[m.name, m.label, m.ranks, m.scores] for m in matrices]}
            for kind, matrices in self.kinds.items()
        ]
        return {"steps": self.steps, "score": self.score, "kinds": kinds}


def history_of(run: RunData) -> History | None:
    """The history of a run; None where it has no matrices."""
    steps, ranks = run.rank_history()
    names = [name for name, of_matrix in ranks.items() if any(of_matrix)][:MOST_MATRICES]
    if not names:
        return None
    kept = evenly(range(len(steps)), max(2, MOST_CELLS // len(names)))
    notes = [f"{len(kept):,} of {len(steps):,} steps"] * (len(kept) < len(steps))
    notes += [f"{len(names):,} of {len(ranks):,} matrices"] * (len(names) < len(ranks))
    score = str(run.options.get("importance", "score"))
    kinds = {
        kind: [
            MatrixHistory(
                name,
                layer_label(name, kind),
                [ranks[name][place] for place in kept],
                [_score(run, name, place) for place in kept],
            )
            for name in group
        ]
        for kind, group in group_by_kind(names).items()
    }
    return History([steps[place] for place in kept], score, kinds, " and ".join(notes))


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _score(run: RunData, name: str, place: int) -> float | None:
    """The score before the change at this place, of three digits."""
    value = run.changes[place - 1]["importance"].get(name) if place else None
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")
