"""When ranks change and by how much: step -> adjustment size b(t). Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError

PAPER_STEPS = 31_931
"""Of the paper's run, whose proportions an `auto` calendar keeps."""
_PAPER_CALENDAR = {"adjust_start": 5_000, "adjust_freeze": 5_000, "adjust_interval": 1_000}

# Exact fractions, so that a size that is exactly a half rounds up on every machine.
_SHAPES: dict[str, Callable[[Fraction], Fraction]] = {
    "cubic": lambda p: 1 - p**3,
    "cubic_fast": lambda p: (1 - p) ** 3,
    "linear": lambda p: 1 - p,
    "exponential": lambda p: Fraction(math.exp(-5 * p)),
    "constant": lambda p: Fraction(1),
}


LEAST_INTERVAL = 20
"""The least that `adjust_interval: auto` gives, in steps: what a new direction needs before its worth can be seen."""

MOST_CHANGES = 100_000
"""Rank changes of a run; their sizes are listed beforehand."""


@dataclass(frozen=True)
class Calendar:
    """The resolved calendar, in steps: a change may fall strictly between `start` and `end`."""

    start: int
    freeze: int
    interval: int
    total_steps: int

    @property
    def end(self) -> int:
        """The first step of the freeze."""
        return self.total_steps - self.freeze

    def due(self, step: int) -> bool:
        """Whether an adjustment is due after `step` (counted from 1)."""
        return self.start < step < self.end and (step - self.start) % self.interval == 0

    def progress(self, step: int) -> Fraction:
        """How far `step` lies through the calendar, in [0, 1]."""
        if self.end <= self.start:
            return Fraction(1)
        return min(Fraction(1), max(Fraction(0), Fraction(step - self.start, self.end - self.start)))


def resolve_calendar(total_steps: int, config: FlexLoRAConfig) -> Calendar:
    """Fill in the `auto` parts of the calendar for a run of `total_steps` steps.

    They keep the proportions of the paper's run: 5,000, 5,000 and 1,000 of its 31,931 steps; but changes are at least
    `LEAST_INTERVAL` steps apart.

    Raises:
        UserError: the run has no step or no whole number of them, or its freeze precedes its start (unless ranks never
            change).
    """
    if not isinstance(total_steps, Integral):
        raise UserError(f"{total_steps} is no whole number of steps", "total steps", "round it")
    if total_steps < 1:
        raise UserError(f"a run of {total_steps} steps has no calendar", "total steps", "give at least 1")
    calendar = Calendar(
        start=_resolved("adjust_start", config.adjust_start, total_steps),
        freeze=_resolved("adjust_freeze", config.adjust_freeze, total_steps),
        interval=_interval(config.adjust_interval, total_steps),
        total_steps=total_steps,
    )
    if config.adjust_size > 0 and calendar.end < calendar.start:
        raise UserError(
            f"the freeze begins at step {calendar.end}, before the start at step {calendar.start}",
            f"keys adjust_start, adjust_freeze; the run has {total_steps} steps",
            "lower one of them",
        )
    return calendar


def require_countable(total_steps: int, config: FlexLoRAConfig) -> None:
    """Raise UserError as `resolve_calendar`, and where a run has more changes than can be listed beforehand."""
    calendar = resolve_calendar(total_steps, config)
    changes = max(0, calendar.end - calendar.start) // calendar.interval
    if config.adjust_size > 0 and changes > MOST_CHANGES:
        raise UserError(
            f"{changes:,} rank changes are more than {MOST_CHANGES:,}",
            f"key adjust_interval; the run has {total_steps:,} steps",
            "raise it",
        )


def adjustment_size(step: int, total_steps: int, config: FlexLoRAConfig) -> int:
    """b(t): the most directions that may move after `step`; 0 where no adjustment is due.

    Args:
        step: attempted optimizer updates so far, counted from 1.
        total_steps: length of the run.

    Raises:
        UserError: as `resolve_calendar`.
    """
    calendar = resolve_calendar(total_steps, config)
    return _size(step, calendar, config) if calendar.due(step) else 0


def due_steps(total_steps: int, config: FlexLoRAConfig) -> list[int]:
    """The steps after which an adjustment is due, ascending; none if ranks never change.

    The last ones may have size 0: the schedule falls to nothing at the end of the calendar.

    Raises:
        UserError: as `resolve_calendar`.
    """
    return list(_planned(total_steps, config)) if config.adjust_size > 0 else []


def describe(total_steps: int, config: FlexLoRAConfig, total_rank: int) -> str:
    """One line for the start of a run: how many changes there will be and how much they can move.

    Args:
        total_rank: the sum of the ranks of all matrices at the start.

    Raises:
        UserError: as `resolve_calendar`.
    """
    calendar = resolve_calendar(total_steps, config)
    if config.adjust_size == 0:
        return "no rank changes (adjust_size is 0)"
    sizes = _planned(total_steps, config)
    if not any(sizes.values()):
        return (
            f"no rank changes: no step of {total_steps:,} is due with start {calendar.start:,}, "
            f"freeze {calendar.freeze:,}, interval {calendar.interval:,} and size {config.adjust_size:,}"
        )
    changes = f"{len(sizes):,} change{'s' if len(sizes) > 1 else ''}"
    span = f"every {calendar.interval:,} steps from step {min(sizes):,} to {max(sizes):,}"
    return f"{changes}, at most {sum(sizes.values()):,} of {total_rank:,} directions ({span})"


def _interval(value: int | str, total_steps: int) -> int:
    if isinstance(value, int):
        return value
    return max(LEAST_INTERVAL, _resolved("adjust_interval", value, total_steps))


def _resolved(name: str, value: int | str, total_steps: int) -> int:
    if isinstance(value, int):
        return value
    return _half_up(Fraction(_PAPER_CALENDAR[name] * total_steps, PAPER_STEPS))


def _planned(total_steps: int, config: FlexLoRAConfig) -> dict[int, int]:
    """{step: size} of every adjustment of the run."""
    calendar = resolve_calendar(total_steps, config)
    steps = range(calendar.start + calendar.interval, calendar.end, calendar.interval)
    return {step: _size(step, calendar, config) for step in steps}


def _size(step: int, calendar: Calendar, config: FlexLoRAConfig) -> int:
    return _half_up(config.adjust_size * _SHAPES[config.schedule](calendar.progress(step)))


def _half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
