"""The directions born at rank changes, as the tables of a report show them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.report.numbers import number
from launch.report.run_data import RunData
from launch.run_folder.new_directions import NewDirection

MOST_DIRECTIONS = 200
"""Rows of the table of single directions: those of the largest |λ|."""


@dataclass(frozen=True)
class Births:
    """Two tables: cells by their column's heading."""

    changes: list[dict[str, str]]
    directions: list[dict[str, str]]
    total: int
    """How many directions were born."""
    loss: str
    """The validation loss that rises are measured from."""


def births_of(run: RunData) -> Births | None:
    """The tables of a run; None where no direction was born."""
    if not run.births:
        return None
    born: dict[int, list[NewDirection]] = {}
    for story in run.births:
        born.setdefault(story.born, []).append(story)
    rows = [_change(step, stories, run.worth.get("changes", [])) for step, stories in born.items()]
    together = run.worth.get("together")
    if together is not None and len(together["born"]) > 1:
        rows.append(_summary("all", run.births, number(together["rise"], "+.4f")))
    largest = sorted(run.births, key=lambda story: -abs(_last(story) or 0.0))[:MOST_DIRECTIONS]
    loss = number(run.worth.get("loss"), ".4f")
    return Births(rows, [_direction(story) for story in largest], len(run.births), loss)


def _change(step: int, stories: Sequence[NewDirection], weighed: Iterable[dict[str, Any]]) -> dict[str, str]:
    """One row; changes that were weighed with their neighbours say so."""
    rise = "–"
    for row in weighed:
        if step in row["born"]:
            shared = "" if len(row["born"]) == 1 else f" (steps {min(row['born'])}–{max(row['born'])})"
            rise = number(row["rise"], "+.4f") + shared
    return _summary(f"{step:,}", stories, rise)


def _summary(step: str, stories: Sequence[NewDirection], rise: str) -> dict[str, str]:
    alive = [story for story in stories if story.pruned is None]
    return {
        "born at step": step,
        "directions": f"{len(stories):,}",
        "how": ", ".join(Counter(story.how for story in stories)),
        "σ, median": _median(story.sigma for story in stories),
        "noise, median": _median(story.noise for story in stories),
        "alive": f"{len(alive):,}",
        "|λ| of these, median": _median(_last(story) for story in alive),
        "rise of the loss without": rise,
    }


def _direction(story: NewDirection) -> dict[str, str]:
    return {
        "matrix": story.matrix,
        "born at step": f"{story.born:,}",
        "how": story.how,
        "σ": number(story.sigma, ".2g"),
        "noise": number(story.noise, ".2g"),
        "last λ": number(_last(story), ".4f"),
        "pruned at step": number(story.pruned, ",d"),
    }


def _last(story: NewDirection) -> float | None:
    """λ at the end, or at the last change that saw the direction."""
    return story.lam[-1][1] if story.lam_end is None and story.lam else story.lam_end


def _median(values: Iterable[float | None]) -> str:
    known = [abs(value) for value in values if value is not None]
    return number(statistics.median(known) if known else None, ".2g")
