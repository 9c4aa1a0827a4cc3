"""Failure signatures of rank allocation, each with a sentence that says what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.rank_changes.record import RankChange
from flexlora_ds.terminal.counted import counted

if TYPE_CHECKING:
    from torch import Tensor

COLLAPSED_SHARE = 0.9
"""This share of matrices at rank 1 is a collapse (never the case by intent below `direction: prune`)."""

LOSS_JUMP = 0.05
"""A relative rise of the validation loss across one change that is worth a warning."""

ENOUGH_PRUNES = 16
"""Prunes before their ages say anything."""

YOUNG_INTERVALS = 2
"""A direction pruned within this many intervals of its birth is young."""


@dataclass(frozen=True)
class Limits:
    """What a run may not leave."""

    total_rank: int
    """Σ ranks at the start."""
    parameters: int
    """Σ r · (in + out) at the start."""
    interval: int
    """Steps between changes."""


def warnings_of(change: RankChange, config: FlexLoRAConfig, limits: Limits, prunes: PruneWatch) -> list[str]:
    """The warnings of one change, most severe first; an empty list where all is well.

    Args:
        prunes: counts this change's prunes too.
    """
    found = []
    at_floor = sum(r == 1 for r in change.ranks.values()) / len(change.ranks)
    if at_floor >= COLLAPSED_SHARE and config.rank > 1:
        found.append(f"{at_floor:.0%} of the matrices are at rank 1: the allocation has collapsed")
    if config.direction == "both" and config.budget == "ranks":
        if change.total_rank != limits.total_rank:
            found.append(f"total rank {change.total_rank} is not its budget {limits.total_rank}")
    elif config.budget == "params":
        used = change.trainable_params - change.total_rank  # without λ
        if used > limits.parameters:
            found.append(f"{used} parameters exceed the budget {limits.parameters}")
    before, after = change.loss_before, change.loss_after
    if before is not None and after is not None and after > before * (1 + LOSS_JUMP):
        found.append(f"the change raised the validation loss from {before:.4f} to {after:.4f}")
    if prunes.turned_young(change.step, change.prune_age, limits.interval):
        found.append(
            f"{prunes.young} of {prunes.prunes} prunes so far hit directions born at most "
            f"{YOUNG_INTERVALS} changes before; see `grace`"
        )
    return found


def unreached(lambdas: Mapping[str, Tensor]) -> list[str]:
    """A warning where matrices have not moved since the start, λ [r] being 0 there; else none.

    Some models read a layer's weight and never call it (WavLM's attention), and reentrant checkpointing passes no
    gradient on from an input that asks for none.
    """
    still = [name for name, lam in lambdas.items() if not bool(lam.any())]
    if not still:
        return []
    return [
        f"λ is still 0 in {len(still)} of {counted(len(lambdas), 'matrix', 'matrices')}, {still[0]} for one: "
        "no gradient reaches a layer whose weight is read without a call, or behind reentrant checkpointing; or "
        "the learning rate was 0"
    ]


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
