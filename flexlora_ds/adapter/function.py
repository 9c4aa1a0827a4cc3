"""y = W x + b + s · P diag(λ) Q x of a frozen linear layer, twice: as one autograd node, and in plain torch.

`adapted_linear` is what training uses. It keeps x and the r-wide z = Q x for the backward pass and nothing else,
adds the update into W x in place, and adds the update's gradient into that of W x in place, so that no tensor as wide
as the layer is written twice. λ and the scale act on z. The dropout mask is computed again in the backward pass.
`plain_adapted_linear` is the same in single operations, with gradients by autograd: the reference.

The node saves the parameters themselves, never a view or a copy of one: under ZeRO-3 their data is gone after the
forward pass and back, in the same Parameter objects, when the layer's backward begins. Through `save_for_backward`
activation checkpointing sees them too, and hands back those of the recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexlora_ds.dropout.apply import FusedMasking, Masking, SeededDropout


def plain_adapted_linear(
    x: Tensor, y: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float, drop: SeededDropout | None
) -> Tensor:
    """y + scale · (x ⊙ mask) Qᵀ diag(λ) Pᵀ, in the dtype of P, λ and Q; x [..., in], y = W x + b [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    if drop is not None:
        rows = rows * drop.mask(rows.shape[1], rows.dtype)
    z = F.linear(rows.to(Q.dtype), Q) * (lam * scale)
    if y.dtype == z.dtype:
        return torch.addmm(y.reshape(-1, y.shape[-1]), z, P.t()).view(y.shape)
    return y + F.linear(z, P).view(y.shape).to(y.dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor,
    lam: Tensor,
    Q: Tensor,
    scale: float,
    drop: SeededDropout | None,
) -> Tensor:
    """W x + b + scale · P diag(λ) Q (x ⊙ mask) in one node; x [..., in] -> [..., out]. W and b get no gradient.

    It computes in x's dtype, or in autocast's where that is on; P and Q of another dtype are cast to it, which costs
    r-wide copies only. Gradients have the dtypes of what they belong to.
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        x = x.to(autocast)
    keys, how = (None, None) if drop is None else (drop.row_keys, (drop.matrix_key, drop.p, drop.fused))
    y: Tensor = _AdaptedLinear.apply(x, weight, bias, P, lam, Q, scale, keys, how)  # type: ignore[no-untyped-call]
    return y


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would compute a product with x in; None where it leaves x as it is."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class _AdaptedLinear(torch.autograd.Function):
    """The node of `adapted_linear`. Shapes, with n the rows of x (all its leading dimensions as one):

    | tensor | shape | |
    |---|---|---|
    | x, rows | [..., in], [n, in] | the input; the same as rows, after the dropout mask |
    | weight, bias | [out, in], [out] | frozen |
    | P, lam, Q | [out, r], [r], [r, in] | |
    | z | [n, r] | Q x, kept for the backward pass |
    | y, grad, g | [..., out], [n, out] | the output; its gradient; the same as rows |
    | through_p, through_lam | [n, r] | g P; the same times λ and the scale |
    | row_keys | [n] | int64, what seeds each row's mask |
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        P: Tensor,
        lam: Tensor,
        Q: Tensor,
        scale: float,
        row_keys: Tensor | None,
        how: tuple[int, float, bool | None] | None,
    ) -> Tensor:
        dtype = x.dtype
        drop = _drop(row_keys, how)
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        rows = x.reshape(-1, x.shape[-1])
        if drop is not None:
            rows = drop.masking(rows.shape[1], dtype).apply(rows)
        z = F.linear(rows, Q.to(dtype))
        y.view(-1, y.shape[-1]).addmm_((z * (lam * scale)).to(dtype), P.to(dtype).t())
        ctx.save_for_backward(x, weight, P, lam, Q, z, row_keys)
        ctx.scale, ctx.how = scale, how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_gradients(ctx, grad), None, None, None)


def _drop(row_keys: Tensor | None, how: tuple[int, float, bool | None] | None) -> SeededDropout | None:
    """`SeededDropout` again: its tensor went through the node's saved tensors, the rest beside them."""
    return None if row_keys is None or how is None else SeededDropout(row_keys, *how)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, W, b, P, λ and Q, for grad [..., out]; shapes as in `_AdaptedLinear`."""
    x, weight, P, lam, Q, z, row_keys = ctx.saved_tensors
    for_x, _, _, for_p, for_lam, for_q, *_ = ctx.needs_input_grad
    dtype = x.dtype
    drop = _drop(row_keys, ctx.how)
    masking = None if drop is None or not (for_x or for_q) else drop.masking(x.shape[-1], dtype)
    strength = lam * ctx.scale
    g = grad.reshape(-1, grad.shape[-1])
    through_p = g @ P.to(dtype)
    through_lam = (through_p * strength).to(dtype)
    grad_x = grad_p = grad_lam = grad_q = None
    if for_p:
        grad_p = ((z * strength).to(dtype).t() @ g).t().to(P.dtype)
    if for_lam:
        wide = torch.promote_types(dtype, torch.float32)
        grad_lam = ((through_p.to(wide) * z).sum(0) * ctx.scale).to(lam.dtype)
    if for_x:
        grad_x = _input_gradient(g, weight.to(dtype), through_lam, Q.to(dtype), masking).view(x.shape)
    if for_q:
        rows = x.reshape(-1, x.shape[-1])
        grad_q = (through_lam.t() @ (rows if masking is None else masking.apply_last(rows))).to(Q.dtype)
    return grad_x, None, None, grad_p, grad_lam, grad_q


def _input_gradient(
    g: Tensor, weight: Tensor, through_lam: Tensor, Q: Tensor, masking: Masking | FusedMasking | None
) -> Tensor:
    """g W + (through_lam Q) ⊙ mask, [rows, in]."""
    if masking is None:
        return (g @ weight).addmm_(through_lam, Q)
    return masking.apply_(through_lam @ Q).addmm_(g, weight)
