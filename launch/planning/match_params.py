"""The rank at which a method trains as many parameters as another, on the mean over the run.

A method that changes ranks spends its budget on directions of unlike size. What is expected of it counts every
direction as the mean of all matrices; what it came to stands in summary.json.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import replace

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.schedule import PAPER_STEPS, adjustment_size, due_steps
from launch.engine.methods.adalora_calendar import budgets, initial_rank
from launch.options.parameter_match import Asked, ParameterMatch, parse_match
from launch.options.train_options import TrainOptions
from launch.planning.parameter_span import Moved, Span, span_of_changes, span_of_masks
from launch.planning.parameters import Shapes, parameters_of

MOST = 65_536
"""The largest rank of the option `rank`."""
_CALENDAR = ("adjust_start", "adjust_freeze", "adjust_interval")


def match_params(options: TrainOptions, shapes: Shapes) -> ParameterMatch | None:
    """The rank that `match_params` means for these layers; None where it is not given.

    Raises:
        UserError: it is neither of its forms, the method has no rank, the run's length is not known, or no rank comes
            near that count.
    """
    if options.match_params is None:
        return None
    asked, place = parse_match(options.match_params), options.place("match_params")
    if asked is None:
        raise UserError(
            f"match_params {options.match_params}", place, "give lora:RANK, or a number of parameters"
        )
    _require_free_rank(options, place)
    wanted = _wanted(asked, shapes)
    limit = _largest_rank(options.method, shapes)
    length = _Length(options, shapes)
    least, most = length.mean(1), length.mean(limit)
    # Nearer to a rank below 1, or above the largest.
    if least - wanted > (length.mean(2) - least) / 2 or wanted - most > (most - length.mean(limit - 1)) / 2:
        raise UserError(
            f"method {options.method} trains {least:,.0f} parameters at rank 1 and {most:,.0f} at rank {limit:,}; "
            f"match_params asks for {wanted:,}",
            place,
            "choose a count between them, or other target_modules",
        )
    rank = _nearest(wanted, limit, length)
    return _matched(asked.text, wanted, rank, length)


def match_over(match: ParameterMatch, options: TrainOptions, shapes: Shapes, steps: int) -> ParameterMatch:
    """What the rank comes to over a run of `steps` steps, once that is known, and whether another would be nearer."""
    length = _Length(options.replace(max_steps=steps), shapes)
    nearest = _nearest(match.wanted, _largest_rank(options.method, shapes), length)
    nearer = nearest if length.mean(nearest) != length.mean(match.rank) else None
    return replace(_matched(match.asked, match.wanted, match.rank, length), nearer=nearer)


def _matched(asked: str, wanted: int, rank: int, length: _Length) -> ParameterMatch:
    low, high = length.span(rank) or (None, None)
    return ParameterMatch(asked, wanted, rank, length.mean(rank), length.varies, low, high)


def _nearest(wanted: int, limit: int, length: _Length) -> int:
    """The first rank that has enough, or the one below it."""
    first = bisect.bisect_left(range(1, limit + 1), True, key=lambda rank: length.mean(rank) >= wanted) + 1
    near = [rank for rank in (first - 1, first) if 1 <= rank <= limit]
    return min(near, key=lambda rank: abs(length.mean(rank) - wanted))


def _require_free_rank(options: TrainOptions, place: str) -> None:
    if not options.traits.has_rank:
        raise UserError(f"method {options.method} has no rank to choose", place, "leave match_params out")
    if options.init_adapter:
        raise UserError("the ranks are those of init_adapter", place, "leave match_params out")


def _wanted(asked: Asked, shapes: Shapes) -> int:
    if asked.lora_rank is not None:
        return int(parameters_of("lora").of_rank(shapes, asked.lora_rank))
    assert asked.count is not None
    return asked.count


def _largest_rank(method: str, shapes: Shapes) -> int:
    """What the layers' shapes allow."""
    least = min(min(shape) for shape in shapes.values())
    return {"flexlora": least, "pissa": least, "olora": least, "lora_ga": max(1, least // 2)}.get(
        method, MOST
    )


class _Length:
    """Trained parameters of a method at a rank, as the mean over the steps of the run."""

    def __init__(self, options: TrainOptions, shapes: Shapes) -> None:
        self._options, self._shapes = options, shapes
        self._count = parameters_of(options.method)
        self._changing = options.traits.changes_ranks and options.adjust_size > 0
        one_way = options.direction == "prune" or (
            options.direction == "expand" and options.budget == "ranks"  # else there is nothing to spend
        )
        self.varies = options.method == "adalora" or (self._changing and one_way)
        self._steps = _steps_of(options) if self.varies else options.max_steps

    def mean(self, rank: int) -> float:
        """Parameters at this rank."""
        of_one = self._count.of_rank(self._shapes, 1)
        if not self.varies:
            return self._count.of_rank(self._shapes, rank)
        return of_one * self._mean_total(rank) / len(self._shapes)

    def span(self, rank: int) -> Span | None:
        """Between what the mean may lie; None where ranks stay, or the length is not known."""
        if self._steps is None or not (self.varies or self._changing):
            return None
        costs = {n: int(self._count.of_rank({n: shape}, 1)) for n, shape in self._shapes.items()}
        begin = self._begin(rank)
        if self._options.method == "adalora":
            masks = list(self._changes(rank, begin))
            return span_of_masks(masks, self._steps, costs, initial_rank(rank))
        config = _config_at(self._options.to_flexlora_config(), rank)
        return span_of_changes(list(self._moved(config, begin)), self._steps, costs, self._shapes, config)

    def _moved(self, config: FlexLoRAConfig, begin: int) -> Iterator[Moved]:
        """What all changes together have moved at most."""
        assert self._steps is not None
        if config.direction != "both":
            if not self.varies:
                return
            for step, total in self._changes(config.rank, begin):
                yield Moved(step, max(0, begin - total), max(0, total - begin))
            return
        moved = 0
        for step in due_steps(self._steps, config):
            moved += min(len(self._shapes) // 2, adjustment_size(step, self._steps, config))
            yield Moved(step, moved, moved)

    def _begin(self, rank: int) -> int:
        return (initial_rank(rank) if self._options.method == "adalora" else rank) * len(self._shapes)

    def _mean_total(self, rank: int) -> float:
        """Σ of the ranks of all matrices; a change after step t counts from t + 1 on."""
        assert self._steps is not None
        begin = self._begin(rank)
        total, current, since = 0, begin, 0
        for step, following in self._changes(rank, begin):
            total, current, since = total + current * (step - since), following, step
        return (total + current * (self._steps - since)) / self._steps

    def _changes(self, rank: int, begin: int) -> Iterator[tuple[int, int]]:
        assert self._steps is not None
        if self._options.method == "adalora":
            return budgets(self._steps, self._options, begin, rank * len(self._shapes))
        config = _config_at(self._options.to_flexlora_config(), rank)
        return _totals(self._steps, config, self._shapes, begin)


def _config_at(config: FlexLoRAConfig, rank: int) -> FlexLoRAConfig:
    """At another rank, which its limits follow."""
    limit = None if config.max_rank is None else max(rank, config.max_rank)
    return replace(config, rank=rank, min_rank=min(rank, config.min_rank), max_rank=limit)


def _totals(steps: int, config: FlexLoRAConfig, shapes: Shapes, begin: int) -> Iterator[tuple[int, int]]:
    """(step, Σ r after it) of FlexLoRA's changes in one direction, each as large as the calendar allows."""
    least = config.min_rank * len(shapes)
    most = sum(config.rank_limit(*shape) for shape in shapes.values())
    current = begin
    for step in due_steps(steps, config):
        moved = min(len(shapes), adjustment_size(step, steps, config))
        current = max(least, current - moved) if config.direction == "prune" else min(most, current + moved)
        yield step, current


def _steps_of(options: TrainOptions) -> int:
    """The run's length, or the paper's where the calendar keeps its proportions whatever the length.

    Raises:
        UserError: it takes the data to know.
    """
    if options.max_steps is not None:
        return options.max_steps
    numbers = [key for key in _CALENDAR if getattr(options, key) != "auto"]
    if numbers:
        raise UserError(
            f"match_params needs the run's length, for {numbers[0]} is a number of steps",
            options.place("match_params"),
            "give max_steps, or leave the calendar auto",
        )
    return PAPER_STEPS
