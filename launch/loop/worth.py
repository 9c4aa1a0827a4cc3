"""The end of a run with rank changes: what the directions born at each are worth, and how they lived."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexlora_ds.rounding import ceil_div
from flexlora_ds.terminal.counted import counted
from flexlora_ds.worth import Directions, by_birth, rises_without, together
from launch.loop.session import Session
from launch.run_folder.new_directions import life_stories, with_last_values

MOST_GROUPS = 40
"""So many validations at most, and two: changes beyond that are weighed with their neighbours."""


@dataclass(frozen=True)
class Group:
    """The living directions of one rank change, or of a few in a row."""

    born: tuple[int, ...]
    """The steps of the changes."""
    directions: Directions

    @property
    def survivors(self) -> int:
        """How many they are."""
        return sum(map(len, self.directions.values()))


def weigh(session: Session) -> dict[str, Any]:
    """`loss`, `changes` and `together` of directions.json: one validation a group, and nothing of the run changes.

    Collective. All rises are None where the run is asked not to weigh, or has nothing to validate on; and those that
    were not measured before the run was asked to stop.
    """
    controller = session.method.controller
    groups = grouped(by_birth(controller.births)) if controller is not None else []
    every = [*groups, joined(groups)] if len(groups) > 1 else groups
    measured = session.validator and session.options.weigh_directions and groups
    loss, rises = _measure(session, every) if measured else (None, [None] * len(every))
    rows = [
        {"born": list(group.born), "survivors": group.survivors, "rise": rise}
        for group, rise in zip(every, rises, strict=True)
    ]
    found = {"loss": loss, "changes": rows[: len(groups)], "together": rows[-1] if rows else None}
    if measured:
        session.log.progress.message(_said(found))
    return found


def _measure(session: Session, groups: Sequence[Group]) -> tuple[float, list[float]]:
    known = session.validator.last_loss  # written after the last step, or there is none yet
    count = len(groups) + (known is None)
    session.log.progress.message(
        f"weighing the directions born at rank changes: {counted(count, 'validation')} (weigh_directions false: none)"
    )
    loss = session.validator() if known is None else known
    directions = (group.directions for group in groups)
    return loss, rises_without(session.engine, directions, session.validator, loss)


def grouped(changes: Mapping[int, Directions]) -> list[Group]:
    """One group a change while they are `MOST_GROUPS` at most, else as many changes in a row as that needs."""
    steps = list(changes)
    width = max(1, ceil_div(len(steps), MOST_GROUPS))
    parts = [steps[i : i + width] for i in range(0, len(steps), width)]
    return [Group(tuple(part), together(changes[step] for step in part)) for part in parts]


def joined(groups: Sequence[Group]) -> Group:
    """All of them as one."""
    born = tuple(step for group in groups for step in group.born)
    return Group(born, together(group.directions for group in groups))


def _said(found: Mapping[str, Any]) -> str:
    rises = [row["rise"] for row in (*found["changes"], found["together"])]
    if not all(map(math.isfinite, rises)):
        return f"{sum(map(math.isfinite, rises))} of {len(rises)} rises of the validation loss were measured"
    parts = [f"{_steps(row['born'])} {_signed(row['rise'])}" for row in _shown(found["changes"])]
    return (
        f"validation loss {found['loss']:.4f}; without the directions born at step "
        f"{', '.join(parts)}; without all of them {_signed(found['together']['rise'])}"
    )


def _shown(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The few whose directions are worth most."""
    yield from sorted(sorted(rows, key=lambda row: -row["rise"])[:6], key=lambda row: row["born"])


def _steps(born: Sequence[int]) -> str:
    return str(born[0]) if len(born) == 1 else f"{born[0]}–{born[-1]}"


def _signed(rise: float) -> str:
    return f"{rise:+.4f}"


def directions_of(
    session: Session, worth: Mapping[str, Any], spectra: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """The object of directions.json; None where no direction was ever born. `spectra`: λ by matrix; on process 0."""
    controller = session.method.controller
    stories = life_stories(session.folder.rank_changes.read(), session.options.new_direction)
    if controller is None or not stories:
        return None
    with_last_values(stories, controller.births, spectra)
    return {**worth, "directions": [asdict(story) for story in stories]}
