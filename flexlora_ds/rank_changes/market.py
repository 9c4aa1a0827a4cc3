"""`importance: growth`: what a new direction would gain, what an old one would cost, and which trades pay. Pure.

All prices are in units of the loss, to first order. Each is the end of an interval that speaks against the trade: a
gain counts by the lower end of its interval over the step's records, a loss by the upper. Where the gradient is noise
the lower end is below zero: nothing is worth buying, and the market stops by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora_ds.allocation import RankPlan, affordable
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.gradient.sketch import Growth
from flexlora_ds.rank_changes.record import Market

STANDARD_ERRORS = 8.0
"""Half the width of the intervals.

Four parts give three degrees of freedom, and leave-one-out estimates are not independent. Of 3,000 draws of pure noise
36 lie above, and 460 above two. With the noise that all matrices have in common (`with_common_noise`) none does.
"""


@dataclass(frozen=True)
class Prices:
    """What the matrices ask and offer at one change; in units of the loss."""

    gain: Mapping[str, float]
    """By matrix: the least that its best new direction should lower the loss until the next change; 0 for nothing."""
    rises: Mapping[str, Tensor]
    """By matrix: the most that the loss should rise without each direction, [r], float64."""
    growths: Mapping[str, Growth]
    """By matrix: that direction, where there is one."""

    def cheapest(self, name: str, mature: Tensor) -> int:
        """Which of a matrix's mature directions costs least, ties by index."""
        return int(self.rises[name].masked_fill(~mature, torch.inf).argmin())

    def losses(self, mature: Mapping[str, Tensor]) -> dict[str, float]:
        """The price of the cheapest mature direction, by matrix that has one."""
        return {
            name: float(rises[mature[name]].min()) for name, rises in self.rises.items() if mature[name].any()
        }


def market_of(prices: Prices, plan: RankPlan, mature: Mapping[str, Tensor]) -> Market:
    """What was offered and traded, for the record."""
    losses = prices.losses(mature)
    return Market(
        gain=dict(prices.gain),
        loss=losses,
        expected_gain=sum(prices.gain[name] for name in plan.expanded),
        expected_loss=sum(losses[name] for name in plan.pruned),
    )


def with_common_noise(growths: Mapping[str, Growth]) -> dict[str, Growth]:
    """No matrix is taken to be less noisy than the median one, by error / σ₁.

    Four parts tell a matrix's own error with three degrees of freedom. Among hundreds of matrices some are small by
    luck, and those would be bought; what all say together is known well.
    """
    errors = {
        name: g.error / g.sigma for name, g in growths.items() if g.sigma > 0 and math.isfinite(g.error)
    }
    if not errors:
        return dict(growths)
    common = statistics.median(errors.values())
    return {
        name: replace(g, error=max(g.error, common * g.sigma)) if name in errors else g
        for name, g in growths.items()
    }


def gain_of(growth: Growth | None, scaling: float, reach: float) -> float:
    """½ · s · λ · (lower end of the gradient along the pair), λ being what the direction can reach; at least 0.

    Half, as the gradient fades while λ grows. `error` is not a number where the records have one part: then 0.

    Args:
        reach: λ's learning rate times the steps to the next change, which is how far Adam moves it.
    """
    if growth is None:
        return 0.0
    lower = growth.fresh - STANDARD_ERRORS * growth.error
    return 0.5 * scaling * reach * lower if lower > 0 else 0.0


def rises_of(lam: Tensor, along: Tensor, scaling: float) -> Tensor:
    """|λᵢ| · (upper end of |∂L/∂λᵢ|), [r], float64.

    0 where λ is 0. Infinite where no part has a gradient: no record says what the direction is worth.

    Args:
        lam: λ, [r].
        along: pᵢᵀ Gⱼ qᵢ of the parts j of the records, [parts, r]; they sum to ∂L/∂λᵢ / s.
    """
    parts = len(along)
    error = along.std(0) * parts**0.5 if parts > 1 else torch.full_like(along[0], torch.inf)
    rises: Tensor = scaling * lam.double().abs() * (along.sum(0).abs() + STANDARD_ERRORS * error)
    rises = torch.nan_to_num(rises, nan=torch.inf, posinf=torch.inf)
    rises[~along.any(0)] = torch.inf
    return rises.masked_fill(lam == 0, 0.0)


def plan_trades(
    prices: Prices,
    ranks: Mapping[str, int],
    size: int,
    config: FlexLoRAConfig,
    shapes: Mapping[str, tuple[int, int]],
    mature: Mapping[str, Tensor],
    *,
    limit: int | None = None,
    not_expandable: Collection[str] = (),
) -> RankPlan:
    """At most `size` purchases, best gain first, each paid for by the cheapest directions while it gains more.

    Prices are per direction, under `budget: params` per parameter. A matrix is bought for or sells, one direction, not
    both. Under `direction: expand` a purchase needs a gain and, with `budget: params`, room below the limit; under
    `prune` the `size` cheapest go, as the calendar says. A price that is not known sells nothing.

    Args:
        limit: for `budget: params`, the most Σ rank · (in + out) may be; None = its present value.
        mature: which directions may go, a boolean [r] by matrix.
    """
    by_parameter = config.budget == "params"
    costs = {name: sum(shapes[name]) if by_parameter else 1 for name in ranks}
    room = limit - sum(ranks[n] * costs[n] for n in ranks) if by_parameter and limit is not None else 0
    losses = prices.losses(mature)
    sellers = sorted(
        (name for name in losses if ranks[name] > config.min_rank and losses[name] < math.inf),
        key=lambda name: losses[name] / costs[name],
    )
    if config.direction == "prune":
        return RankPlan(pruned=sellers[:size])
    buyers = sorted(
        (
            name
            for name, gain in prices.gain.items()
            if gain > 0 and ranks[name] < config.rank_limit(*shapes[name]) and name not in not_expandable
        ),
        key=lambda name: -prices.gain[name] / costs[name],
    )
    if config.direction == "expand":
        return RankPlan(expanded=affordable(buyers[:size], costs, room if by_parameter else None))
    return _trades(buyers, sellers, prices.gain, losses, costs, room, size)


def _trades(
    buyers: Sequence[str],
    sellers: Sequence[str],
    gains: Mapping[str, float],
    losses: Mapping[str, float],
    costs: Mapping[str, int],
    room: int,
    size: int,
) -> RankPlan:
    """Purchase by purchase; one that does not pay or cannot be paid for is passed over."""
    pruned: list[str] = []
    expanded: list[str] = []
    for buyer in buyers:
        if len(expanded) == size:
            break
        if buyer in pruned:
            continue
        taken = _payment(costs[buyer] - room, {buyer, *pruned, *expanded}, sellers, costs, size - len(pruned))
        if taken is None or sum(losses[name] for name in taken) >= gains[buyer]:
            continue
        room += sum(costs[name] for name in taken) - costs[buyer]
        pruned += taken
        expanded.append(buyer)
    return RankPlan(pruned, expanded)


def _payment(
    price: int, barred: Collection[str], sellers: Sequence[str], costs: Mapping[str, int], most: int
) -> list[str] | None:
    """The cheapest sellers that free `price` between them; None where `most` of them do not."""
    taken: list[str] = []
    for name in sellers:
        if price <= 0:
            break
        if name not in barred and len(taken) < most:
            taken.append(name)
            price -= costs[name]
    return taken if price <= 0 else None
