"""What happened at one rank change: the line of `ranks.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Market:
    """The prices of one change under `importance: growth`, in units of the loss; each counts against the trade."""

    gain: dict[str, float]
    """By matrix, the least that its best new direction should lower the loss until the next change; 0 for nothing."""
    loss: dict[str, float]
    """By matrix, the most that the loss should rise without its cheapest direction."""
    expected_gain: float
    """The sum of the gains that were bought; 0 where nothing was traded."""
    expected_loss: float
    """The sum of the losses that were taken for it."""


@dataclass(frozen=True)
class RankChange:
    """One rank change, as applied after `step`. Losses are None where no validation was given."""

    step: int
    adjust_size: int
    importance: dict[str, float]
    score_margin: float | None
    pruned: list[str]
    expanded: list[str]
    prune_age: list[int]
    """Age in steps of each pruned direction, in the order of `pruned`."""
    ranks: dict[str, int]
    total_rank: int
    trainable_params: int
    loss_before: float | None
    loss_after: float | None
    spectrum_error: float
    seconds: float
    sigma: dict[str, float] = field(default_factory=dict)
    """By expanded matrix, the singular value of ∂L/∂W along the new direction, where it is the gradient's."""
    noise: dict[str, float] = field(default_factory=dict)
    """By expanded matrix, the standard error of ∂L/∂W along its new direction, from parts of the step's records."""
    market: Market | None = None
    """With `importance: growth`, what was offered and traded."""
    newborn: dict[str, list[list[float]]] = field(default_factory=dict)
    """By matrix, [step born, λ before this change] of each living direction that was born after the start."""
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `ranks.jsonl`."""
        return asdict(self)


def newborn_of(
    births: Mapping[str, Sequence[tuple[int, int]]], lambdas: Mapping[str, Tensor]
) -> dict[str, list[list[float]]]:
    """`RankChange.newborn`, of (step, number of the change) of every direction's birth and λ, [r], by matrix."""
    found = {
        name: [[born, x] for (born, _), x in zip(of_matrix, lambdas[name].tolist(), strict=True) if born]
        for name, of_matrix in births.items()
    }
    return {name: rows for name, rows in found.items() if rows}
