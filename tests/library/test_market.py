"""What pays is traded, dearest first; noise buys nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora_ds import FlexLoRAConfig
from flexlora_ds.gradient.growth import folds_by_place
from flexlora_ds.gradient.sketch import Growth, growth_of
from flexlora_ds.rank_changes.market import (
    Prices,
    gain_of,
    market_of,
    plan_trades,
    rises_of,
    with_common_noise,
)

PAIR = torch.ones(1, 1)
NAMES = ("a", "b", "c", "d")
SHAPES = {"a": (4, 4), "b": (4, 4), "c": (12, 4), "d": (4, 4)}


def growth(fresh: float, error: float) -> Growth:
    return Growth(PAIR, PAIR, 9.0, fresh, error)


def prices(gain: dict[str, float], loss: dict[str, list[float]]) -> Prices:
    return Prices(gain, {n: torch.tensor(v, dtype=torch.float64) for n, v in loss.items()}, {})


def plan(offered: Prices, size: int = 4, **options: Any) -> tuple[list[str], list[str]]:
    config = FlexLoRAConfig(rank=2, **{"new_direction": "gradient", "importance": "growth", **options})
    mature = {name: torch.ones(2, dtype=torch.bool) for name in NAMES}
    limit = sum(2 * sum(shape) for shape in SHAPES.values())
    found = plan_trades(offered, dict.fromkeys(NAMES, 2), size, config, SHAPES, mature, limit=limit)
    return found.pruned, found.expanded


CHEAP = {"a": [0.3, 0.9], "b": [0.2, 0.1], "c": [0.5, 0.5], "d": [7.0, 6.0]}


def test_a_gain_is_half_of_rate_times_gradient_at_the_lower_end() -> None:
    assert gain_of(growth(3.0, 0.25), scaling=2.0, reach=0.1) == pytest.approx(0.5 * 2 * 0.1 * (3 - 8 * 0.25))
    assert gain_of(growth(3.0, 0.4), 2.0, 0.1) == 0.0
    assert gain_of(growth(3.0, math.nan), 2.0, 0.1) == 0.0, "one record says nothing of its noise"
    assert gain_of(None, 2.0, 0.1) == 0.0


def test_a_rise_is_lambda_times_gradient_at_the_upper_end() -> None:
    along = torch.tensor(
        [[1.0, 0.5], [3.0, -0.5]], dtype=torch.float64
    )  # parts' sums 4 and 0, errors 2 and 1
    found = rises_of(torch.tensor([-0.1, 0.2]), along, 2.0)
    assert found.tolist() == pytest.approx([2 * 0.1 * (4 + 8 * 2), 2 * 0.2 * (0 + 8 * 1)])
    assert rises_of(torch.tensor([0.1]), torch.ones(1, 1), 2.0).isinf().all()


def test_a_direction_that_no_record_has_seen_is_not_for_free() -> None:
    found = rises_of(torch.tensor([-0.1, 0.0, 0.3]), torch.zeros(4, 3, dtype=torch.float64), 2.0)
    assert found.tolist() == [math.inf, 0.0, math.inf]
    unknown = torch.full((4, 2), math.nan, dtype=torch.float64)
    assert rises_of(torch.tensor([0.1, 0.0]), unknown, 2.0).tolist() == [math.inf, 0.0]


def test_records_of_one_part_say_nothing_of_their_noise() -> None:
    U, G = parts(12.0, 0)
    G[1:] = 0
    found = growth_of(U, G)
    assert math.isnan(found.error)
    assert gain_of(found, 2.0, 0.1) == 0.0


def test_the_best_buys_from_the_cheapest_while_it_pays() -> None:
    """d buys of b for 0.1, a of none: c would cost 0.5 and gains 0.4."""
    offered = prices({"d": 1.0, "a": 0.4, "b": 0.0, "c": 0.0}, CHEAP)
    assert plan(offered) == (["b"], ["d"])
    assert plan(offered, size=0) == ([], [])
    assert plan(prices({"d": 1.0, "a": 0.6, "b": 0.0, "c": 0.0}, CHEAP)) == (["b", "c"], ["d", "a"])
    mature = {name: torch.tensor([True, name != "b"]) for name in NAMES}
    market = market_of(offered, plan_trades(
        offered, dict.fromkeys(NAMES, 2), 4, FlexLoRAConfig(rank=2), SHAPES, mature
    ), mature)  # fmt: skip
    assert (market.expected_gain, market.expected_loss) == (1.0, 0.2)
    assert market.loss == {"a": 0.3, "b": 0.2, "c": 0.5, "d": 6.0}


def test_nothing_is_traded_where_nothing_gains() -> None:
    assert plan(prices(dict.fromkeys(NAMES, 0.0), CHEAP)) == ([], [])
    assert plan(prices({"d": 0.1, "a": 0.0, "b": 0.0, "c": 0.0}, CHEAP)) == ([], []), (
        "the cheapest costs as much"
    )


def test_limits_of_ranks_hold() -> None:
    offered = prices({"d": 1.0, "a": 0.9, "b": 0.0, "c": 0.0}, CHEAP)
    assert plan(offered, min_rank=2) == ([], [])
    assert plan(offered, max_rank=2) == ([], [])


def test_by_parameters_prices_are_per_parameter_and_the_limit_holds() -> None:
    """c is twice as large: it needs two sellers, and its gain counts half."""
    offered = prices({"c": 1.0, "d": 0.7, "a": 0.0, "b": 0.0}, CHEAP)
    assert plan(offered, budget="params") == (["b"], ["d"]), (
        "d gains more a parameter; then a alone does not pay for c"
    )
    alone = prices({"c": 1.0, "d": 0.0, "a": 0.0, "b": 0.0}, CHEAP)
    assert plan(alone, budget="params") == (["b", "a"], ["c"])
    assert plan(alone, budget="params", size=1) == ([], [])


def test_one_sided_directions() -> None:
    offered = prices({"d": 1.0, "a": 0.2, "b": 0.0, "c": 0.0}, CHEAP)
    assert plan(offered, direction="expand") == ([], ["d", "a"])
    assert plan(offered, direction="expand", budget="params") == ([], [])
    assert plan(offered, direction="prune", size=2) == (["b", "a"], [])


def test_a_price_that_is_not_known_sells_nothing() -> None:
    unknown = {**CHEAP, "b": [math.inf, math.inf]}
    assert plan(prices(dict.fromkeys(NAMES, 0.0), unknown), direction="prune") == (["a", "c", "d"], [])


def test_rows_are_dealt_out_by_whole_records() -> None:
    """A record is never in two parts: what it says twice would look like agreement."""
    cpu = torch.device("cpu")
    assert folds_by_place(6, 3, 3, cpu).tolist() == [3, 3, 0, 0, 1, 1]
    assert folds_by_place(5, 1, 0, cpu).tolist() == [0] * 5
    assert folds_by_place(8, 0, 0, cpu).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def parts(signal: float, seed: int) -> tuple[Tensor, Tensor]:
    """Four parts of a matrix [40, 30] with a pair of this strength under noise; U is all of the space."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, 40, 30, generator=rng)
    noise[:, 0] += signal * torch.nn.functional.normalize(torch.ones(30), dim=0)
    return torch.eye(40), noise


def test_noise_has_a_leading_pair_and_says_nothing_on_fresh_records() -> None:
    found = [growth_of(*parts(0.0, seed)) for seed in range(200)]
    fresh = torch.tensor([g.fresh for g in found])
    sigma = torch.tensor([g.sigma for g in found])
    assert sigma.min() > 15
    assert abs(float(fresh.mean())) < 4 * float(fresh.std()) / 200**0.5, "free of the choice"
    assert float(fresh.std()) < 0.3 * float(sigma.mean())
    bought = sum(gain_of(g, 2.0, 0.1) > 0 for g in found)
    assert bought < 9, "some 1 %"


def test_a_signal_shows_on_fresh_records() -> None:
    for seed in range(20):
        U, G = parts(12.0, seed)
        found = growth_of(U, G)
        exact = torch.linalg.svd(G.sum(0).double())
        assert found.sigma == pytest.approx(float(exact.S[0]), rel=1e-6)
        assert abs(float(found.left[:, 0].double() @ exact.U[:, 0])) > 1 - 1e-6
        assert abs(float(found.right[0].double() @ exact.Vh[0])) > 1 - 1e-6
        assert 36 < found.fresh < found.sigma, "below σ, which counts the noise that the pair was chosen by"
        assert found.fresh - 2 * found.error > 0
    assert sum(gain_of(growth_of(*parts(12.0, seed)), 2.0, 0.1) > 0 for seed in range(20)) > 15


def test_among_many_matrices_of_noise_none_is_bought() -> None:
    """A hundred matrices of noise: by its own error alone each hundredth would be bought, in every change."""
    for change in range(3):
        found = {str(i): growth_of(*parts(0.0, 1000 * change + i)) for i in range(100)}
        assert not any(gain_of(g, 2.0, 0.1) for g in with_common_noise(found).values())
    assert any(gain_of(growth_of(*parts(0.0, seed)), 2.0, 0.1) for seed in range(200)), (
        "and this check can fail"
    )


def test_what_stands_out_still_does_among_noise() -> None:
    found = {str(i): growth_of(*parts(40.0 if i < 10 else 0.0, i)) for i in range(50)}
    bought = [name for name, g in with_common_noise(found).items() if gain_of(g, 2.0, 0.1) > 0]
    assert bought == [str(i) for i in range(10)]


def test_no_matrix_is_less_noisy_than_the_median_one() -> None:
    known = {name: growth(3.0, error) for name, error in (("a", 0.9), ("b", 1.8), ("c", 3.6))}
    found = with_common_noise(known | {"d": growth(3.0, math.nan)})
    assert [found[n].error for n in "abc"] == pytest.approx([1.8, 1.8, 3.6])
    assert math.isnan(found["d"].error), "what one record says stays unknown"
    assert with_common_noise({"d": growth(3.0, math.nan)})["d"].fresh == 3.0
    assert with_common_noise({}) == {}
