"""Drop and add directions of one matrix: P, λ, Q and their optimizer state alike.

A direction is one triple (column of P, element of λ, row of Q). Values in, values out; every process computes the
same, because the random vectors come from a named generator and the rest from whole fp32 masters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear, gaussian, init_std
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.seeds import generator

SMALL_LAMBDA = 1e-3
"""λ of a new direction under `new_direction: small` (the paper's Table 6)."""

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

Fresh = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorEdit:
    """Keep the directions `keep` (in this order) along `axis`, then append `added` new ones.

    `fresh(survivors)` makes the new master values from the surviving ones; new optimizer state is zero (an age of
    zero makes Adam's bias correction treat them as newborn), or the survivors' mean where `survivor_mean` is set.
    """

    axis: int
    keep: tuple[int, ...]
    added: int
    fresh: Fresh
    survivor_mean: bool = False

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The shape after the edit."""
        new = list(old)
        new[self.axis] = len(self.keep) + self.added
        return tuple(new)

    def __call__(self, whole: Tensor, key: str) -> Tensor:
        """The whole tensor of one state key after the edit."""
        kept = whole.index_select(self.axis, torch.tensor(self.keep, device=whole.device))
        if not self.added:
            return kept
        if key == MASTER:
            new = self.fresh(kept).to(kept)
        elif self.survivor_mean and key in MOMENTS:
            new = kept.mean(self.axis, keepdim=True).expand(*self._new_shape(kept))
        else:
            new = kept.new_zeros(self._new_shape(kept))
        return torch.cat([kept, new], self.axis)

    def _new_shape(self, kept: Tensor) -> tuple[int, ...]:
        shape = list(kept.shape)
        shape[self.axis] = self.added
        return tuple(shape)


def matrix_edits(
    layer: AdaptedLinear,
    keep: Sequence[int],
    added: int,
    config: FlexLoRAConfig,
    step: int,
    pair: tuple[Tensor, Tensor] | None = None,
) -> dict[nn.Parameter, TensorEdit]:
    """The edits of a matrix's three parameters that keep `keep` and add `added` directions at `step`.

    Args:
        pair: p [out, added] and q [added, in] of the new directions; None draws them as `new_direction` says
            (`gradient` draws as `zero_impact` does).
    """
    mean = config.new_moment == "survivor_mean"
    kept = tuple(keep)

    def vectors(axis: int, role: str, width: int) -> Fresh:
        def fresh(survivors: Tensor) -> Tensor:
            if pair is not None:
                return pair[0 if role == "P" else 1]
            rng = generator(config.seed, "direction", step, layer.name, role)
            columns = survivors if axis == 1 else survivors.T
            new = _new_vectors(columns, width, added, config, rng)
            return new if axis == 1 else new.T

        return fresh

    def new_lambda(survivors: Tensor) -> Tensor:
        value = SMALL_LAMBDA if config.new_direction == "small" else 0.0
        return torch.full((added,), value)

    return {
        layer.P: TensorEdit(1, kept, added, vectors(1, "P", layer.out_features), mean),
        layer.lam: TensorEdit(0, kept, added, new_lambda, mean),
        layer.Q: TensorEdit(0, kept, added, vectors(0, "Q", layer.in_features), mean),
    }


def _new_vectors(
    survivors: Tensor, width: int, count: int, config: FlexLoRAConfig, rng: torch.Generator
) -> Tensor:
    """[width, count] new vectors beside `survivors` [width, r]."""
    if config.new_direction == "zero":
        return torch.zeros(width, count)
    std = init_std(config, width) if config.new_direction_std is None else config.new_direction_std
    drawn = gaussian(count, width, std, rng).T
    if config.new_direction in ("zero_impact", "gradient"):
        return drawn
    return _orthonormal_to(survivors, drawn)


def _orthonormal_to(survivors: Tensor, drawn: Tensor) -> Tensor:
    """Unit vectors in the span of `drawn` [width, k] made orthogonal to `survivors` [width, r] and to each other."""
    r = survivors.shape[1]
    stacked = torch.cat([survivors.double().cpu(), drawn.double()], 1)
    basis: Tensor = torch.linalg.qr(stacked)[0]  # columns r… are orthogonal to the span of the first r
    return basis[:, r:].float()


def smallest_directions(lam: Tensor, count: int, mature: Sequence[bool]) -> list[int]:
    """Indices of the `count` mature directions with the smallest |λ|, ties by index.

    The paper's code drops the smallest signed value, which is the strongest negative direction.
    """
    order = sorted((i for i in range(len(lam)) if mature[i]), key=lambda i: (abs(float(lam[i])), i))
    return order[:count]
