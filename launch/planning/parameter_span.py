"""Between what counts a run's trained parameters may lie, since nobody knows which matrices rank changes favour. Pure.

A direction of a wide matrix has more parameters than one of a narrow matrix. After k changes a matrix has gained or
lost k directions at most. So the extremes are those of filling the widest matrices first, or the narrowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexlora_ds.config import FlexLoRAConfig

Costs = Mapping[str, int]
"""Parameters of one direction, by matrix."""


class Span(NamedTuple):
    """The least and the most that a count can be."""

    low: float
    high: float


class Moved(NamedTuple):
    """After a change: how many directions all changes so far have taken away, and how many they have added."""

    step: int
    pruned: int
    expanded: int


def span_of_changes(
    moved: Sequence[Moved],
    steps: int,
    costs: Costs,
    shapes: Mapping[str, tuple[int, int]],
    config: FlexLoRAConfig,
) -> Span:
    """Of FlexLoRA, the mean over the steps; every matrix begins at `config.rank`.

    Args:
        moved: by change, what is moved at most.
    """
    start = config.rank * sum(costs.values())
    losable = dict.fromkeys(costs, config.rank - config.min_rank)
    gainable = {name: config.rank_limit(*shapes[name]) - config.rank for name in costs}
    spans: list[tuple[int, Span]] = []
    before, last = Moved(0, 0, 0), Span(start, start)
    for number, change in enumerate(moved, 1):
        lost = _extremes(costs, _at_most(losable, number), change.pruned)
        won = _extremes(costs, _at_most(gainable, number), change.expanded)
        low, high = start + won.low - lost.high, start + won.high - lost.low
        # Fewer directions may move: the count is then nearer to what it was.
        if config.direction == "both" or not _moves_as_many_as_it_may(config):
            low, high = min(low, start), max(high, start)
        elif _may_run_short(losable, change.pruned, change.pruned - before.pruned):
            high = last.high
        elif _may_run_short(gainable, change.expanded, change.expanded - before.expanded):
            low = last.low
        before, last = change, Span(low, min(high, start) if config.budget == "params" else high)
        spans.append((change.step, last))
    return _mean(start, spans, steps)


def _moves_as_many_as_it_may(config: FlexLoRAConfig) -> bool:
    return config.importance != "growth" and not config.grace and not config.expand_min_energy


def _may_run_short(room: Mapping[str, int], total: int, size: int) -> bool:
    """Whether so many matrices may be at their limits that a change finds fewer than `size` others."""
    full = sorted(room.values())[: max(0, len(room) - size + 1)]
    return size > 0 and sum(full) <= total


def _at_most(room: Mapping[str, int], number: int) -> dict[str, int]:
    return {name: min(number, most) for name, most in room.items()}


def span_of_masks(budgets: Sequence[tuple[int, int]], steps: int, costs: Costs, rank: int) -> Span:
    """Of AdaLoRA, the mean over the steps; every matrix begins at `rank`.

    Args:
        budgets: (step, directions left after it) of every mask.
    """
    room = dict.fromkeys(costs, rank)
    spans = [(step, _extremes(costs, room, left)) for step, left in budgets]
    return _mean(rank * sum(costs.values()), spans, steps)


def _extremes(costs: Costs, room: Mapping[str, int], count: int) -> Span:
    """What `count` directions cost at the least and at the most; no matrix has more than its room."""
    ascending = sorted(costs, key=lambda name: costs[name])
    return Span(*(_filled(names, costs, room, count) for names in (ascending, ascending[::-1])))


def _filled(names: Sequence[str], costs: Costs, room: Mapping[str, int], count: int) -> int:
    total = 0
    for name in names:
        taken = min(room[name], count)
        total, count = total + taken * costs[name], count - taken
    return total


def _mean(start: float, spans: Sequence[tuple[int, Span]], steps: int) -> Span:
    """A change after step t counts from t + 1 on."""
    low = high = 0.0
    current, since = Span(start, start), 0
    for step, following in spans:
        low, high = low + current.low * (step - since), high + current.high * (step - since)
        current, since = following, step
    rest = steps - since
    return Span((low + current.low * rest) / steps, (high + current.high * rest) / steps)
