"""How AdaLoRA's budget falls: from 1.5 · `rank` directions in every matrix, as in its paper, to `rank` on average.

The calendar is that of `adjust_start` (PEFT's tinit), `adjust_freeze` (tfinal) and `adjust_interval` (deltaT). Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from flexlora_ds.errors import UserError
from flexlora_ds.rounding import ceil_div
from flexlora_ds.schedule import MOST_CHANGES, Calendar, resolve_calendar
from launch.options.train_options import TrainOptions


def initial_rank(rank: int) -> int:
    """Directions of every matrix at the start, so that `rank` are left on average at the end."""
    return ceil_div(3 * rank, 2)


def calendar_of(total_steps: int, options: TrainOptions) -> Calendar:
    """When the budget falls: after `start`, until `end`.

    Raises:
        UserError: no step lies between the two, or there are more masks than can be listed beforehand.
    """
    calendar = resolve_calendar(total_steps, options.to_flexlora_config())
    if calendar.start >= calendar.end:
        raise UserError(
            f"AdaLoRA's budget falls between its start at step {calendar.start} and its freeze at step {calendar.end}",
            f"keys adjust_start, adjust_freeze; the run has {total_steps} steps",
            "lower one of them",
        )
    masks = (calendar.end - calendar.start) // calendar.interval
    if masks > MOST_CHANGES:
        raise UserError(
            f"{masks:,} rank changes are more than {MOST_CHANGES:,}",
            f"key adjust_interval; the run has {total_steps:,} steps",
            "raise it",
        )
    return calendar


def budgets(total_steps: int, options: TrainOptions, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(step, directions left after it) of every mask that PEFT (0.21) draws, of `begin` at the start to `end`.

    Raises:
        UserError: as `calendar_of`.
    """
    calendar = calendar_of(total_steps, options)
    first = (calendar.start // calendar.interval + 1) * calendar.interval
    for step in range(first, calendar.end, calendar.interval):
        left = 1 - (step - calendar.start) / (calendar.end - calendar.start)
        yield step, int((begin - end) * left**3 + end)
    yield calendar.end, end


def describe(total_steps: int, options: TrainOptions, matrices: int) -> str:
    """One line for the start of a run."""
    calendar = calendar_of(total_steps, options)
    begin, end = initial_rank(options.rank) * matrices, options.rank * matrices
    return (
        f"AdaLoRA's budget falls from {begin:,} to {end:,} directions between steps {calendar.start:,} and "
        f"{calendar.end:,}, every {calendar.interval:,} steps"
    )
