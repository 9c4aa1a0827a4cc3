"""The plan of a rank change against its definition by brute force, and its invariants over many rounds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_ds.allocation import RankPlan, plan_ranks
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError

ROUNDS = 50
STARTS = settings(max_examples=200, deadline=None)


@dataclass
class Start:
    """A drawn model: its matrices, its options, and the seed of the scores to come."""

    config: FlexLoRAConfig
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, int]
    seed: int


@st.composite
def starts(draw: st.DrawFn, /, **fixed: Any) -> Start:
    rank = draw(st.integers(1, 8))
    config = FlexLoRAConfig(
        rank=rank,
        min_rank=draw(st.integers(1, rank)),
        max_rank=draw(st.none() | st.integers(rank, 12)),
        **fixed,
    )
    widths = st.integers(config.min_rank, 24)
    shapes = {f"layers.{i}": draw(st.tuples(widths, widths)) for i in range(draw(st.integers(1, 14)))}
    ranks = {name: min(rank, *shape) for name, shape in shapes.items()}
    return Start(config, shapes, ranks, draw(st.integers(0, 2**32)))


def draw_scores(rng: random.Random, names: list[str]) -> dict[str, float]:
    """Scores of one round, on a coarse grid half of the time, so that ties are common."""
    levels = rng.choice([3, 10**9])
    return {name: rng.randrange(levels) / levels for name in names}


def apply(plan: RankPlan, ranks: dict[str, int]) -> dict[str, int]:
    return {name: rank - plan.pruned.count(name) + plan.expanded.count(name) for name, rank in ranks.items()}


def parameters(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def check_bounds_and_order(
    plan: RankPlan, start: Start, scores: dict[str, float], size: int
) -> dict[str, int]:
    """What holds of every plan, whatever the options; returns the new ranks."""
    assert len(plan.pruned) <= size and len(plan.expanded) <= size
    assert len(set(plan.pruned)) == len(plan.pruned) and len(set(plan.expanded)) == len(plan.expanded)
    assert not set(plan.pruned) & set(plan.expanded)
    assert all(scores[low] <= scores[high] for low in plan.pruned for high in plan.expanded)
    ranks = apply(plan, start.ranks)
    for name in plan.pruned:
        assert ranks[name] >= start.config.min_rank >= 1
    for name in plan.expanded:
        assert ranks[name] <= start.config.rank_limit(*start.shapes[name])
    return ranks


def rounds(start: Start) -> Any:
    """Run the plans of `ROUNDS` rounds; yields (plan, ranks before, ranks after)."""
    rng = random.Random(start.seed)
    limit = parameters(start.ranks, start.shapes)
    for _ in range(ROUNDS):
        scores, size = draw_scores(rng, list(start.ranks)), rng.randint(0, 6)
        plan = plan_ranks(scores, start.ranks, size, start.config, start.shapes, limit=limit)
        before, start.ranks = start.ranks, check_bounds_and_order(plan, start, scores, size)
        yield plan, before, start.ranks


@STARTS
@given(starts(direction="both", budget="ranks"))
def test_both_keeps_the_sum_of_ranks(start: Start) -> None:
    for plan, before, after in rounds(start):
        assert len(plan.pruned) == len(plan.expanded)
        assert sum(after.values()) == sum(before.values())


@STARTS
@given(starts(direction="both", budget="params"))
def test_params_never_exceeds_its_limit(start: Start) -> None:
    limit = parameters(start.ranks, start.shapes)
    for _, _, after in rounds(start):
        assert parameters(after, start.shapes) <= limit


@STARTS
@given(st.sampled_from(["ranks", "params"]).flatmap(lambda budget: starts(direction="prune", budget=budget)))
def test_prune_never_grows_anything(start: Start) -> None:
    for plan, before, after in rounds(start):
        assert not plan.expanded
        assert all(after[name] <= before[name] for name in after)


@STARTS
@given(st.sampled_from(["ranks", "params"]).flatmap(lambda budget: starts(direction="expand", budget=budget)))
def test_expand_never_shrinks_anything(start: Start) -> None:
    limit = parameters(start.ranks, start.shapes)
    for plan, before, after in rounds(start):
        assert not plan.pruned
        assert all(after[name] >= before[name] for name in after)
        assert start.config.budget == "ranks" or parameters(after, start.shapes) <= limit


def brute_force(
    scores: dict[str, float], size: int, start: Start, limit: int, locked: set[str], weak: set[str]
) -> tuple[list[str], list[str]]:
    """The plan by its definition: try every length from `size` down."""
    config, ranks, shapes = start.config, start.ranks, start.shapes
    names = list(scores)
    order = sorted(range(len(names)), key=lambda i: (scores[names[i]], i))
    low = [names[i] for i in order if ranks[names[i]] > config.min_rank and names[i] not in locked]
    high = [
        names[i]
        for i in reversed(order)
        if ranks[names[i]] < min(config.max_rank or 4 * config.rank, *shapes[names[i]])
        and names[i] not in weak
    ]
    if config.direction == "prune":
        return low[:size], []

    def fits(pruned: list[str], expanded: list[str]) -> bool:
        return not set(pruned) & set(expanded) and all(
            scores[a] <= scores[b] for a in pruned for b in expanded
        )

    pruned: list[str] = []
    if config.direction == "both":
        lengths = [k for k in range(size + 1) if len(low) >= k and len(high) >= k and fits(low[:k], high[:k])]
        pruned = low[: max(lengths)]
        if config.budget == "ranks":
            return pruned, high[: max(lengths)]
    expanded: list[str] = []
    for name in high:
        grown = apply(RankPlan(pruned, [*expanded, name]), ranks)
        if not fits(pruned, [*expanded, name]):
            continue
        if len(expanded) == size or (config.budget == "params" and parameters(grown, shapes) > limit):
            break
        expanded.append(name)
    return pruned, expanded


@settings(max_examples=400, deadline=None)
@given(
    start=st.tuples(
        st.sampled_from(["both", "prune", "expand"]), st.sampled_from(["ranks", "params"])
    ).flatmap(lambda options: starts(direction=options[0], budget=options[1])),
    size=st.integers(0, 8),
    slack=st.integers(-50, 100),
)
def test_plans_are_those_of_brute_force(start: Start, size: int, slack: int) -> None:
    rng = random.Random(start.seed)
    names = list(start.ranks)
    start.ranks = {
        name: rng.randint(start.config.min_rank, start.config.rank_limit(*start.shapes[name]))
        for name in names
    }
    scores = draw_scores(rng, names)
    locked, weak = ({name for name in names if rng.random() < 0.15} for _ in range(2))
    limit = parameters(start.ranks, start.shapes) + slack
    plan = plan_ranks(
        scores,
        start.ranks,
        size,
        start.config,
        start.shapes,
        limit=limit,
        not_prunable=locked,
        not_expandable=weak,
    )
    assert (plan.pruned, plan.expanded) == brute_force(scores, size, start, limit, locked, weak)


def equal_model(count: int, rank: int = 4, **options: Any) -> Start:
    names = [f"m{i}" for i in range(count)]
    config = FlexLoRAConfig(rank=rank, **options)
    return Start(config, dict.fromkeys(names, (64, 64)), dict.fromkeys(names, rank), 0)


def planned(start: Start, scores: list[float], size: int, **keywords: Any) -> RankPlan:
    named = dict(zip(start.ranks, scores, strict=True))
    return plan_ranks(named, start.ranks, size, start.config, start.shapes, **keywords)


def test_a_plain_case() -> None:
    plan = planned(equal_model(6), [0.5, 0.1, 0.9, 0.3, 0.8, 0.6], 2)
    assert plan.pruned == ["m1", "m3"]
    assert plan.expanded == ["m2", "m4"]
    assert plan.score_margin == pytest.approx(0.2)
    assert not plan.empty


def test_ties_go_by_module_order() -> None:
    plan = planned(equal_model(4), [0.5] * 4, 4)
    assert (plan.pruned, plan.expanded) == (["m0", "m1"], ["m3", "m2"])
    assert plan.score_margin == 0.0


def test_matrices_at_their_limits_are_passed_over() -> None:
    start = equal_model(5, max_rank=6)
    start.ranks |= {"m0": 1, "m4": 6}
    plan = planned(start, [0.1, 0.2, 0.3, 0.4, 0.5], 1)
    assert (plan.pruned, plan.expanded) == (["m1"], ["m3"])


def test_narrow_layers_never_exceed_their_shape() -> None:
    start = equal_model(2)
    start.shapes["m1"] = (4, 64)
    assert planned(start, [0.1, 0.9], 1).empty


def test_savings_are_carried_until_the_top_matrix_can_be_paid() -> None:
    # One direction of `down` costs as much as three and three fifths of k_proj: it takes four prunes.
    shapes = {f"k{i}": (1024, 4096) for i in range(6)} | {"down": (4096, 14336)}
    config = FlexLoRAConfig(rank=8, budget="params")
    ranks = dict.fromkeys(shapes, 8)
    limit = parameters(ranks, shapes)
    history = []
    for _ in range(4):
        scores = {name: float(i) for i, name in enumerate(shapes)}
        plan = plan_ranks(scores, ranks, 1, config, shapes, limit=limit)
        ranks = apply(plan, ranks)
        history.append(plan.expanded)
    assert history == [[], [], [], ["down"]]
    assert parameters(ranks, shapes) == limit - 4 * 5120 + 18432


def test_one_large_direction_buys_several_small_ones() -> None:
    shapes = {"down": (4096, 14336), **{f"k{i}": (1024, 4096) for i in range(6)}}
    ranks = dict.fromkeys(shapes, 8)
    config = FlexLoRAConfig(rank=8, budget="params", min_rank=1)
    scores = {name: float(i) for i, name in enumerate(shapes)}
    plan = plan_ranks(scores, ranks, 4, config, shapes, not_prunable={f"k{i}" for i in range(6)})
    assert plan.pruned == ["down"]
    assert plan.expanded == ["k5", "k4", "k3"]


def test_scores_within_the_margin_do_not_change_the_plan() -> None:
    rng = random.Random(5)
    for _ in range(200):
        start = equal_model(12, min_rank=2)
        start.ranks = {name: rng.randint(2, 16) for name in start.ranks}
        scores = [rng.random() for _ in start.ranks]
        plan = planned(start, scores, rng.randint(1, 8))
        if plan.score_margin is None:
            continue
        assert plan.score_margin > 0
        for _ in range(5):
            noise = 0.49 * plan.score_margin
            moved = planned(start, [s + rng.uniform(-noise, noise) for s in scores], max(1, len(plan.pruned)))
            assert set(moved.pruned) == set(plan.pruned) and set(moved.expanded) == set(plan.expanded)


def test_nothing_to_do_is_an_empty_plan() -> None:
    for size in (0, -1):
        assert planned(equal_model(4), [0.1, 0.2, 0.3, 0.4], size) == RankPlan()
    assert planned(equal_model(1), [0.5], 3).empty
    assert plan_ranks({}, {}, 3, FlexLoRAConfig(), {}).empty


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(RunError, match="m1"):
        planned(equal_model(2), [0.5, math.nan], 1)
