"""What one rank change does: by scores, or by prices. Pure: matrices as they are read -> a plan, and what goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexlora_ds.allocation import RankPlan, plan_ranks
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.directions import smallest_directions
from flexlora_ds.gradient.sketch import Growth
from flexlora_ds.importance import not_expandable, score_matrices
from flexlora_ds.rank_changes.market import Prices, market_of, plan_trades
from flexlora_ds.rank_changes.record import Market
from flexlora_ds.rank_changes.spectra import MatrixView

Matrices = Mapping[str, MatrixView]


@dataclass(frozen=True)
class Decision:
    """Who gives and who receives, and which directions go."""

    scores: dict[str, float]
    """The importance of each matrix; under `growth` its gain."""
    plan: RankPlan
    leaving: dict[str, int]
    """By pruned matrix, the index of the direction that goes."""
    growths: Mapping[str, Growth] | None = None
    """The directions that were priced; None where no price was asked."""
    market: Market | None = None


def by_score(matrices: Matrices, size: int, config: FlexLoRAConfig, limit: int, step: int) -> Decision:
    """`plan_ranks` by the scores of `config.importance`; what is pruned loses its smallest mature |λ|.

    Args:
        limit: for `budget: params`, the most Σ rank · (in + out) may be.

    Raises:
        RunError: λ or a sensitivity is not finite.
    """
    scores = _scores(matrices, config, step)
    plan = plan_ranks(
        scores,
        _ranks(matrices),
        size,
        config,
        {name: matrix.shape for name, matrix in matrices.items()},
        limit=limit,
        not_prunable=[name for name, matrix in matrices.items() if not matrix.mature.any()],
        not_expandable=_barred(matrices, config),
    )
    leaving = {
        name: smallest_directions(matrices[name].lam, 1, matrices[name].mature.tolist())[0]
        for name in plan.pruned
    }
    return Decision(scores, plan, leaving)


def by_price(matrices: Matrices, prices: Prices, size: int, config: FlexLoRAConfig, limit: int) -> Decision:
    """`plan_trades`; what is pruned loses its cheapest mature direction.

    Args:
        limit: as in `by_score`.
    """
    mature = {name: matrix.mature for name, matrix in matrices.items()}
    plan = plan_trades(
        prices,
        _ranks(matrices),
        size,
        config,
        {name: matrix.shape for name, matrix in matrices.items()},
        mature,
        limit=limit,
        not_expandable=_barred(matrices, config),
    )
    leaving = {name: prices.cheapest(name, mature[name]) for name in plan.pruned}
    return Decision(dict(prices.gain), plan, leaving, prices.growths, market_of(prices, plan, mature))


def _scores(matrices: Matrices, config: FlexLoRAConfig, step: int) -> dict[str, float]:
    exact, sensitive = config.spectrum == "exact", config.importance == "sensitivity"
    return score_matrices(
        {name: matrix.mature_exact() if exact else matrix.lam for name, matrix in matrices.items()},
        config,
        mature=None if exact else {name: matrix.mature for name, matrix in matrices.items()},
        sensitivity={n: m.sensitivity for n, m in matrices.items() if m.sensitivity is not None}
        if sensitive
        else None,
        step=step,
    )


def _ranks(matrices: Matrices) -> dict[str, int]:
    return {name: len(matrix.lam) for name, matrix in matrices.items()}


def _barred(matrices: Matrices, config: FlexLoRAConfig) -> frozenset[str]:
    return not_expandable({name: matrix.lam for name, matrix in matrices.items()}, config)
