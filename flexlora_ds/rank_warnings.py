"""Failure signatures of rank allocation, each with a sentence that says what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora_ds.schedule import resolve_calendar

if TYPE_CHECKING:
    from flexlora_ds.controller import RankController

COLLAPSED_SHARE = 0.9
"""This share of matrices at rank 1 is a collapse (never the case by intent below `direction: prune`)."""

LOSS_JUMP = 0.05
"""A relative rise of the validation loss across one change that is worth a warning."""

ENOUGH_PRUNES = 16
"""Prunes before their ages say anything."""

YOUNG_INTERVALS = 2
"""A direction pruned within this many intervals of its birth is young."""


def warnings_of(
    controller: RankController,
    step: int,
    prune_ages: list[int],
    losses: tuple[float | None, float | None],
) -> list[str]:
    """The warnings of one change, most severe first; an empty list where all is well."""
    found = []
    ranks = controller.ranks
    at_floor = sum(r == 1 for r in ranks.values()) / len(ranks)
    if at_floor >= COLLAPSED_SHARE and controller.config.rank > 1:
        found.append(f"{at_floor:.0%} of the matrices are at rank 1: the allocation has collapsed")
    if controller.config.direction == "both" and controller.config.budget == "ranks":
        if controller.total_rank != controller.initial_total_rank:
            found.append(
                f"total rank {controller.total_rank} is not its budget {controller.initial_total_rank}"
            )
    elif controller.config.budget == "params":
        used = controller.trainable_parameters(with_lambda=False)
        if used > controller.parameter_limit:
            found.append(f"{used} parameters exceed the budget {controller.parameter_limit}")
    before, after = losses
    if before is not None and after is not None and after > before * (1 + LOSS_JUMP):
        found.append(f"the change raised the validation loss from {before:.4f} to {after:.4f}")
    if controller.watch.turned_young(step, prune_ages, _interval(controller)):
        found.append(
            f"{controller.watch.young} of {controller.watch.prunes} prunes so far hit directions born at most "
            f"{YOUNG_INTERVALS} changes before; see `grace`"
        )
    return found


@dataclass
class PruneWatch:
    """Counts how many prunes hit young directions; warns once in a run."""

    prunes: int = 0
    young: int = 0
    warned: bool = False

    def turned_young(self, step: int, ages: list[int], interval: int) -> bool:
        """Count the ages of one change's prunes; True once, when most of at least `ENOUGH_PRUNES` were young."""
        self.prunes += len(ages)
        self.young += sum(age < step and age <= YOUNG_INTERVALS * interval for age in ages)
        if self.warned or self.prunes < ENOUGH_PRUNES or self.young * 2 <= self.prunes:
            return False
        self.warned = True
        return True


def _interval(controller: RankController) -> int:
    return resolve_calendar(controller.total_steps, controller.config).interval
