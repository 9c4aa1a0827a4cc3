"""What happened at one rank change: the line of `ranks.jsonl`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `ranks.jsonl`."""
        return asdict(self)
