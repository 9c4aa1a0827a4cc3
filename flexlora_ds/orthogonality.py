"""Keeping P's columns and Q's rows orthonormal, so that λ are the singular values of P diag(λ) Q. Pure.

Every function takes P [out, r] and Q [r, in], computes in float32 or better, and returns plain tensors: the
strength (γ, or η) and where the result is applied are the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

PENALTY_FORMS = ("norm", "squared")
LARGEST_STEP = 0.5
"""The most that η of `decoupled_change` may be: beyond it a singular value passes 1, and from 1 on moves away."""


def violation(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """How far both are from orthonormal: ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F, two scalars."""
    return torch.linalg.matrix_norm(gram_excess(P)), torch.linalg.matrix_norm(gram_excess(Q.T))


def penalty(P: Tensor, Q: Tensor, form: str) -> Tensor:
    """What `orth_form` norm or squared adds to the loss for one matrix, before its weight; a scalar.

    `norm`: ‖PᵀP − I‖_F + ‖QQᵀ − I‖_F; `squared` (the paper's Eq. 2): the sum of their squares.
    """
    assert form in PENALTY_FORMS, form
    p, q = violation(P, Q)
    return p + q if form == "norm" else p.square() + q.square()


def penalty_gradients(P: Tensor, Q: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The gradient of `penalty`, in closed form: shapes of P and Q.

    `norm`: 2P(PᵀP − I)/‖PᵀP − I‖_F, and 0 where the norm is 0 (there it has no gradient; autograd gives NaN);
    `squared`: 4P(PᵀP − I). For Q the same of its transpose.
    """
    assert form in PENALTY_FORMS, form
    return _column_gradient(P, form), _column_gradient(Q.T, form).T


def decoupled_change(P: Tensor, Q: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """One step towards orthonormality: P − η P(PᵀP − I) and Q − η (QQᵀ − I)Q, new tensors of the same shapes.

    It moves every singular value σ to σ − η σ(σ² − 1) and leaves the singular vectors as they are.

    Args:
        eta: `orth_weight` times the learning-rate schedule's factor; at most `LARGEST_STEP`.
    """
    return decoupled_step(_wide(P), eta, tall=True), decoupled_step(_wide(Q), eta, tall=False)


def decoupled_step(matrix: Tensor, eta: float, *, tall: bool) -> Tensor:
    """`decoupled_change` of one P [..., n, r] (`tall`) or Q [..., r, n]; of several at once where they are stacked."""
    excess = gram(matrix, tall=tall)
    excess.diagonal(dim1=-2, dim2=-1).sub_(1)
    left, right = (matrix, excess) if tall else (excess, matrix)
    add_product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    return add_product(matrix, left, right, alpha=-eta)


def gram(matrix: Tensor, *, tall: bool) -> Tensor:
    """PᵀP of P [..., n, r] (`tall`), QQᵀ of Q [..., r, n]: [..., r, r]."""
    return matrix.mT @ matrix if tall else matrix @ matrix.mT


def gram_excess(columns: Tensor) -> Tensor:
    """PᵀP − I of P [n, r]: [r, r]. (For Q give its transpose.)"""
    columns = _wide(columns)
    return gram(columns, tall=True) - torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)


def _column_gradient(columns: Tensor, form: str) -> Tensor:
    excess = gram_excess(columns)
    product = _wide(columns) @ excess
    if form == "squared":
        return 4 * product
    norm = torch.linalg.matrix_norm(excess)
    return torch.where(norm > 0, 2 * product / norm, torch.zeros_like(product))


def _wide(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they already are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
