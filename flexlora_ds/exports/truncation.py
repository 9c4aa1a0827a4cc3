"""One trained adapter at any size: its largest singular values over all matrices, by one threshold. Pure.

ΔW = scale · B A of each matrix has a singular value decomposition of r terms. By Eckart and Young the largest k give
the nearest matrix of rank k, so one threshold over all matrices gives the nearest adapter of a total rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix


@dataclass(frozen=True)
class Size:
    """How much of an adapter to keep: exactly one of the first three is given."""

    total_rank: int | None = None
    """Directions over all matrices at most."""
    parameters: int | None = None
    """Σ rank · (in + out) at most."""
    energy: float | None = None
    """The share of Σ σ² to keep at least, in (0, 1]."""
    min_rank: int = 1
    """Directions that every matrix keeps; with 0 a matrix may be left out of the adapter."""


@dataclass(frozen=True)
class Truncated:
    """A smaller adapter, and how much of the whole it is."""

    adapter: LoraAdapter
    directions: tuple[int, int]
    """Kept, and there before."""
    parameters: tuple[int, int]
    energy: float
    """The share of Σ σ² that is kept."""

    def line(self) -> str:
        """For the user."""
        kept, before = self.directions
        small, whole = self.parameters
        return (
            f"kept {kept:,} of {before:,} directions, {small:,} of {whole:,} parameters ({small / whole:.1%}), "
            f"{self.energy:.2%} of the energy"
        )


def truncate(adapter: LoraAdapter, size: Size) -> Truncated:
    """The adapter's leading singular directions that fit into `size`.

    Raises:
        UserError: the size is below `min_rank` directions of every matrix, or keeps none at all.
    """
    parts = {name: decomposed(matrix) for name, matrix in adapter.matrices.items()}
    costs = {name: matrix.B.shape[0] + matrix.A.shape[1] for name, matrix in adapter.matrices.items()}
    ranks = kept_ranks({name: part.sigma.tolist() for name, part in parts.items()}, costs, size)
    matrices = {
        name: part.leading(ranks[name], adapter.matrices[name].scale)
        for name, part in parts.items()
        if ranks[name]
    }
    before = {name: matrix.rank for name, matrix in adapter.matrices.items()}
    whole = sum(float(part.sigma.square().sum()) for part in parts.values())
    kept = sum(float(part.sigma[: ranks[name]].square().sum()) for name, part in parts.items())
    return Truncated(
        replace(adapter, matrices=matrices, folder=None),  # that folder holds the whole
        (sum(ranks.values()), sum(before.values())),
        (sum(ranks[n] * costs[n] for n in ranks), sum(before[n] * costs[n] for n in before)),
        kept / whole if whole else 1.0,
    )


def kept_ranks(spectra: Mapping[str, list[float]], costs: Mapping[str, int], size: Size) -> dict[str, int]:
    """The rank that each matrix keeps.

    Every matrix keeps its `min_rank` largest singular values. The others follow over all matrices from the largest
    down, to the first that does not fit. Equal ones go by the order of the matrices.

    Args:
        spectra: the singular values of each matrix, descending.
        costs: parameters of one direction of each matrix, in + out.

    Raises:
        UserError: as `truncate`.
    """
    ranks = {name: min(size.min_rank, len(sigma)) for name, sigma in spectra.items()}
    rest = [
        (-value, number, name)
        for number, (name, sigma) in enumerate(spectra.items())
        for value in sigma[ranks[name] :]
    ]
    left = _Remaining(size, spectra, ranks, costs)
    for value, _, name in sorted(rest):
        if not left.take(-value, costs[name]):
            break
        ranks[name] += 1
    if not any(ranks.values()):
        raise UserError("this size keeps no direction of any matrix", _place(size), "give a larger one")
    return ranks


@dataclass
class Decomposition:
    """ΔW = left · diag(σ) · right."""

    left: Tensor
    """[out, r], orthonormal columns, float64."""
    sigma: Tensor
    """[r], descending."""
    right: Tensor
    """[r, in], orthonormal rows."""

    def leading(self, rank: int, scale: float) -> LoraMatrix:
        """The first `rank` terms as a LoRA of the scale given, fp32."""
        strengths = (
            self.sigma[:rank] / scale if scale else torch.zeros_like(self.sigma[:rank])
        )  # alpha may be 0
        B = self.left[:, :rank] * strengths
        return LoraMatrix(B.float().contiguous(), self.right[:rank].float().contiguous(), scale)


def decomposed(matrix: LoraMatrix) -> Decomposition:
    """The singular value decomposition of ΔW, from those of its thin factors."""
    left, upper = torch.linalg.qr(matrix.B.double())
    right, lower = torch.linalg.qr(matrix.A.double().T)
    U, sigma, V = torch.linalg.svd(matrix.scale * upper @ lower.T, full_matrices=False)
    return Decomposition(left @ U, sigma, V @ right.T)


class _Remaining:
    """What of a size is not used yet."""

    def __init__(
        self,
        size: Size,
        spectra: Mapping[str, list[float]],
        ranks: Mapping[str, int],
        costs: Mapping[str, int],
    ) -> None:
        self._by_energy = size.energy is not None
        self._per_parameter = size.parameters is not None
        kept = sum(value**2 for name, sigma in spectra.items() for value in sigma[: ranks[name]])
        if size.energy is not None:
            self._left = size.energy * sum(v**2 for sigma in spectra.values() for v in sigma) - kept
            return
        used = sum(rank * (costs[name] if self._per_parameter else 1) for name, rank in ranks.items())
        allowed = size.parameters if self._per_parameter else size.total_rank
        assert allowed is not None, "a size names a total rank, a number of parameters or an energy"
        if used > allowed:
            raise UserError(
                f"{allowed:,} is below rank {size.min_rank} in every matrix, which is {used:,}",
                _place(size),
                f"give at least {used:,}, or --min_rank 0 to leave matrices out",
            )
        self._left = float(allowed - used)

    def take(self, value: float, cost: int) -> bool:
        """Whether one more direction is kept; counts it then."""
        if self._by_energy:
            if self._left <= 0:
                return False
            self._left -= value**2
            return True
        price = cost if self._per_parameter else 1
        if price > self._left:
            return False
        self._left -= price
        return True


def _place(size: Size) -> str:
    if size.energy is not None:
        return "--energy"
    return "--parameters" if size.parameters is not None else "--rank_budget"
