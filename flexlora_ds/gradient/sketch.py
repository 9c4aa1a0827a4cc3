"""The top singular triples of a matrix G from two thin products with it. Pure.

G itself is never needed: Y = G Ωᵀ [out, k] spans its leading left singular vectors, and the singular value
decomposition of B = Uᵀ G [k, in], with U an orthonormal basis of Y, gives the triples (Halko, Martinsson and Tropp,
"Finding structure with randomness", 2011, algorithms 4.1 and 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Columns of a sketch beyond the triples wanted: they make the subspace of the wanted ones exact enough."""


@dataclass(frozen=True)
class Triples:
    """Leading singular triples of a matrix, σ descending."""

    left: Tensor
    """[out, k], orthonormal columns, fp32."""
    sigma: Tensor
    """[k], fp32."""
    right: Tensor
    """[k, in], orthonormal rows, fp32."""


def sketch_width(rank: int, out_features: int, in_features: int) -> int:
    """Columns of the sketch for `rank` triples of an [out, in] matrix."""
    return min(rank + OVERSAMPLING, out_features, in_features)


def range_basis(sketch: Tensor) -> Tensor:
    """An orthonormal basis of the columns of Y = G Ωᵀ, [out, k] -> [out, k], fp32.

    Computed in float64: the columns of a sketch are nearly parallel where one singular value leads.
    """
    basis: Tensor = torch.linalg.qr(sketch.double())[0]
    return basis.float()


def one_pass_factors(sketch: Tensor, co_sketch: Tensor, left_factor: Tensor) -> tuple[Tensor, Tensor]:
    """G ≈ U B from two products taken at the same time.

    U is an orthonormal basis of Y = G Ωᵀ; B solves Ψ U B = Z in least squares (Tropp, Yurtsever, Udell and Cevher,
    "Practical sketching algorithms for low-rank matrix approximation", 2017, algorithm 4).

    Args:
        sketch: Y, [out, k].
        co_sketch: Z = Ψ G, [..., l, in], l > k; of several matrices whose columns U spans, or of one.
        left_factor: Ψᵀ, [out, l].

    Returns:
        U [out, k] with orthonormal columns and B [..., k, in], fp32.
    """
    basis = range_basis(sketch)
    seen = left_factor.double().T @ basis.double()
    return basis, (torch.linalg.pinv(seen) @ co_sketch.double()).float()


def outside_of(basis: Tensor, projected: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(I − P P⁺) U B (I − Q⁺ Q) as another U B: the part of G that the directions P, Q do not span.

    Args:
        basis: U, [out, k], orthonormal columns.
        projected: B, [..., k, in].
        p: P, [out, r]; its columns need not be orthonormal.
        q: Q, [r, in].
    """
    columns = torch.linalg.qr(p.double())[0]
    rows = torch.linalg.qr(q.double().T)[0]
    U, B = basis.double(), projected.double()
    for _ in range(2):  # once more, as what is left over of a column inside the span is rounding
        U = U - columns @ (columns.T @ U)
    left, triangle = torch.linalg.qr(U)
    B = triangle @ B
    return left.float(), (B - (B @ rows) @ rows.T).float()


def leading_triples(basis: Tensor, projected: Tensor, rank: int) -> Triples:
    """The `rank` leading triples of G.

    Args:
        basis: U, [out, k], orthonormal columns.
        projected: B = Uᵀ G, [k, in].
        rank: at most k.
    """
    left, sigma, right = torch.linalg.svd(projected.double(), full_matrices=False)
    return Triples((basis.double() @ left[:, :rank]).float(), sigma[:rank].float(), right[:rank].float())


@dataclass(frozen=True)
class Growth:
    """The leading pair of G = Σ Gᵢ, and what it is worth on records that did not choose it."""

    left: Tensor
    """p, [out, 1], fp32, of norm 1."""
    right: Tensor
    """q, [1, in], fp32, of norm 1."""
    sigma: float
    """pᵀ G q: on the records that chose it, so that noise alone gives a large value too."""
    fresh: float
    """Σ pᵢᵀ Gᵢ qᵢ, each pair the leading one of the other parts' sum: its expectation is 0 where G is noise."""
    error: float
    """The standard error of `fresh`, from the parts' spread; not a number where fewer than two have a gradient."""


def growth_of(basis: Tensor, projected: Tensor) -> Growth:
    """The leading pair of Σ Gᵢ and its leave-one-out estimate.

    All of it happens in the Gram matrices Bᵢ Bⱼᵀ. U spans the columns of every part alike, so that turning the sign of
    one part changes neither U nor the distribution of noise: the estimate is free of the choice.

    Args:
        basis: U, [out, k], orthonormal columns.
        projected: Bᵢ = Uᵀ Gᵢ, [parts, k, in].
    """
    parts = len(projected)
    B = projected.double()
    grams = torch.einsum("aki,bli->abkl", B, B)
    of_all = grams.sum((0, 1))
    u, sigma = _leading(of_all)
    v = u @ B.sum(0) / max(sigma, 1e-300)
    found = []
    for part in range(parts if parts > 1 else 0):
        others = [other for other in range(parts) if other != part]
        u_others, sigma_others = _leading(grams[others][:, others].sum((0, 1)))
        along = float(u_others @ grams[part, others].sum(0) @ u_others)
        found.append(along / sigma_others if sigma_others > 0 else 0.0)
    telling = sum(bool(part.any()) for part in B)
    spread = float(torch.tensor(found, dtype=torch.float64).std()) if telling > 1 else math.nan
    p = (basis.double() @ u).float()
    return Growth(p[:, None], v.float()[None], sigma, math.fsum(found), spread * math.sqrt(parts))


def _leading(gram: Tensor) -> tuple[Tensor, float]:
    """The leading left vector, [k], and singular value of a matrix by its Gram matrix [k, k]."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -1], math.sqrt(max(float(values[-1]), 0.0))
