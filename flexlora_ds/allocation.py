"""Who gives and who receives: scores, ranks, shapes and a size -> the plan of one rank change. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError


@dataclass(frozen=True)
class RankPlan:
    """One rank change: each named matrix loses or gains one direction; no name is in both lists."""

    pruned: list[str] = field(default_factory=list)
    """Matrices that lose a direction, lowest score first."""
    expanded: list[str] = field(default_factory=list)
    """Matrices that gain a direction, highest score first."""
    score_margin: float | None = None
    """The smallest gap between a chosen matrix and the next candidate of its list: scores that err by less
    than half of it give the same lists. None where no candidate was left out."""

    @property
    def empty(self) -> bool:
        """Whether the change changes nothing."""
        return not self.pruned and not self.expanded


@dataclass(frozen=True)
class _Candidates:
    """Names in the order in which they would be pruned and expanded, and their scores."""

    prunable: list[str]
    expandable: list[str]
    scores: Mapping[str, float]


def plan_ranks(
    scores: dict[str, float],
    ranks: dict[str, int],
    size: int,
    config: FlexLoRAConfig,
    shapes: dict[str, tuple[int, int]],
    *,
    limit: int | None = None,
    not_prunable: Collection[str] = (),
    not_expandable: Collection[str] = (),
) -> RankPlan:
    """Plan one rank change of at most `size` directions pruned and `size` expanded.

    Matrices are sorted by (score, position in `scores`); the lowest are pruned, the highest expanded,
    skipping those at their limits. Under `direction: both` the lists have the greatest length for which they
    are disjoint and no pruned score is above an expanded one. Under `budget: params` the expanded list is
    what the pruned one and earlier savings pay for, from the top down to the first that does not fit.

    Args:
        scores: importance of each matrix; the order of the keys is the module order and breaks ties.
        ranks: present rank of each matrix.
        size: the adjustment size b(t).
        shapes: (out, in) of each matrix's layer.
        limit: for `budget: params`, the most Σ rank · (in + out) may be; None = its present value.
        not_prunable: matrices that must keep their directions (all of them within their grace).
        not_expandable: matrices that must not grow (`importance.not_expandable`).

    Raises:
        RunError: a score is not a number.
    """
    candidates = _candidates(scores, ranks, config, shapes, not_prunable, not_expandable)
    costs = {name: sum(shapes[name]) for name in scores}
    budget = None
    if config.budget == "params":
        total = sum(ranks[name] * costs[name] for name in scores)
        budget = (total if limit is None else limit) - total
    if config.direction == "prune":
        pruned, expanded = candidates.prunable[: max(0, size)], []
    elif config.direction == "expand":
        pruned, expanded = [], affordable(candidates.expandable[: max(0, size)], costs, budget)
    elif budget is None:
        k = _balanced_length(candidates, size)
        pruned, expanded = candidates.prunable[:k], candidates.expandable[:k]
    else:
        pruned = candidates.prunable[: _balanced_length(candidates, size)]
        budget += sum(costs[name] for name in pruned)
        expanded = affordable(_above(pruned, candidates)[: max(0, size)], costs, budget)
    return RankPlan(pruned, expanded, _score_margin(pruned, expanded, candidates))


def _candidates(
    scores: Mapping[str, float],
    ranks: Mapping[str, int],
    config: FlexLoRAConfig,
    shapes: Mapping[str, tuple[int, int]],
    not_prunable: Collection[str],
    not_expandable: Collection[str],
) -> _Candidates:
    for name, score in scores.items():
        if math.isnan(score):
            raise RunError("the importance is not a number", name, "look for a loss that diverged")
    ascending = sorted(scores, key=lambda name: scores[name])  # stable: ties stay in module order
    prunable = [name for name in ascending if ranks[name] > config.min_rank and name not in not_prunable]
    expandable = [
        name
        for name in reversed(ascending)
        if ranks[name] < config.rank_limit(*shapes[name]) and name not in not_expandable
    ]
    return _Candidates(prunable, expandable, scores)


def _balanced_length(candidates: _Candidates, size: int) -> int:
    """The largest k <= size whose k pruned and k expanded are disjoint and in order."""
    scores, pruned, expanded = candidates.scores, set[str](), set[str]()
    pairs = zip(candidates.prunable[: max(0, size)], candidates.expandable, strict=False)
    for k, (low, high) in enumerate(pairs):
        pruned.add(low)
        expanded.add(high)
        # Both lists only grow with k, so that the first failure is final.
        if pruned & expanded or scores[low] > scores[high]:
            return k
    return min(max(0, size), len(candidates.prunable), len(candidates.expandable))


def _above(pruned: Sequence[str], candidates: _Candidates) -> list[str]:
    """The expandable matrices that are not pruned themselves nor score below a pruned one."""
    floor = max((candidates.scores[name] for name in pruned), default=-math.inf)
    taken = set(pruned)
    return [name for name in candidates.expandable if name not in taken and candidates.scores[name] >= floor]


def affordable(names: Sequence[str], costs: Mapping[str, int], budget: int | None) -> list[str]:
    """The leading names whose costs sum to at most `budget` parameters (None: all of them)."""
    if budget is None:
        return list(names)
    bought = []
    for name in names:
        budget -= costs[name]
        if budget < 0:
            break
        bought.append(name)
    return bought


def _score_margin(pruned: list[str], expanded: list[str], candidates: _Candidates) -> float | None:
    scores = candidates.scores
    gaps = [
        abs(scores[ordered[len(chosen)]] - scores[chosen[-1]])
        for chosen, ordered in ((pruned, candidates.prunable), (expanded, candidates.expandable))
        if chosen and len(chosen) < len(ordered)
    ]
    return min(gaps, default=None)
