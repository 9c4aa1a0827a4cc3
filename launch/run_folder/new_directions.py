"""The life of every direction born at a rank change, read from the lines of ranks.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass
class NewDirection:
    """One direction born after the start: an entry of `directions` in directions.json.

    A matrix gains at most one direction at a change, so its name and the step tell one from another.
    """

    matrix: str
    born: int
    """The step of the change that made it."""
    how: str
    """As in the option `new_direction`; a matrix without a usable gradient draws as `zero_impact` does."""
    sigma: float | None = None
    """The singular value of ∂L/∂W along it at its birth, where it is the gradient's."""
    noise: float | None = None
    """The standard error of `sigma`, where it was measured."""
    lam: list[list[float]] = field(default_factory=list)
    """[step, λ] before each later change."""
    lam_end: float | None = None
    """λ at the end of the run; None before it, and for one that was pruned."""
    pruned: int | None = None
    """The step of the change that removed it."""


def life_stories(changes: Sequence[Row], new_direction: str) -> list[NewDirection]:
    """Every direction born at these changes, in the order of their births.

    Rows of runs before `newborn` was logged leave gaps in `lam`, and nothing else.

    Args:
        changes: rows of ranks.jsonl, ascending.
        new_direction: the option of this name.
    """
    found: dict[tuple[str, int], NewDirection] = {}
    for row in changes:
        step = row["step"]
        for name, moments in row.get("newborn", {}).items():
            for born, value in moments:
                if (name, born) in found:
                    found[name, born].lam.append([step, value])
        for name, age in zip(row["pruned"], row["prune_age"], strict=False):
            if (name, step - age) in found:
                found[name, step - age].pruned = step
        for name in row["expanded"]:
            found[name, step] = _born(row, name, new_direction)
    return list(found.values())


def _born(row: Row, name: str, new_direction: str) -> NewDirection:
    sigma = row.get("sigma", {}).get(name)
    drawn = new_direction == "gradient" and sigma is None
    how = "zero_impact" if drawn else new_direction
    return NewDirection(name, row["step"], how, sigma, row.get("noise", {}).get(name))


def with_last_values(
    stories: Sequence[NewDirection],
    births: Mapping[str, Sequence[tuple[int, int]]],
    spectra: Mapping[str, Sequence[float]],
) -> None:
    """Enter λ at the end.

    Args:
        births: (step, number of the change) of every living direction, by matrix.
        spectra: λ of every living direction, by matrix.
    """
    last = {
        (name, born): value
        for name, of_matrix in births.items()
        for (born, _), value in zip(of_matrix, spectra[name], strict=True)
        if born
    }
    for story in stories:
        story.lam_end = last.get((story.matrix, story.born))
