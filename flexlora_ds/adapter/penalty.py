"""The orthogonality penalty of the loss (`orth_form: norm | squared`) as a gradient added in the backward pass.

γ/n · Σ f(P) + f(Q) depends on the parameters alone, so its gradient has a closed form. It is added where a matrix's
own backward runs: there ZeRO-3 holds P and Q gathered, and the wrapper averages and clips it with the task's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexlora_ds.orthogonality import penalty_gradients


@dataclass(frozen=True)
class PenaltyGradient:
    """`form`: norm or squared; `coefficient()`: γ/n times the loss scale, or 0 where this backward adds nothing.

    A matrix gets it once in an update, however often its layer is called. Who counts updates says when one begins.
    """

    form: str
    coefficient: Callable[[], float]
    added: set[int] = field(default_factory=set, init=False)
    """The P that have got theirs in this update, by id."""

    def begin_update(self) -> None:
        """Each matrix gets it again."""
        self.added.clear()

    def attach(self, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """y unchanged; its backward also sends the penalty's gradient to P and Q."""
        out: Tensor = _Attach.apply(y, p, q, self)  # type: ignore[no-untyped-call]
        return out


class _Attach(torch.autograd.Function):
    """y [..., out], p [out, r], q [r, in]; gradients have the shapes of what they belong to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, p: Tensor, q: Tensor, penalty: PenaltyGradient) -> Tensor:
        ctx.save_for_backward(p, q)
        ctx.penalty, ctx.of = penalty, id(p)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        coefficient = ctx.penalty.coefficient()
        # A layer may be called several times in one pass (ALBERT's), and a model in one update.
        wanted = any(ctx.needs_input_grad[1:3])
        if coefficient == 0 or not wanted or ctx.of in ctx.penalty.added:
            return grad, None, None, None
        ctx.penalty.added.add(ctx.of)
        p, q = ctx.saved_tensors
        grad_p, grad_q = penalty_gradients(p.float(), q.float(), ctx.penalty.form)
        return grad, (coefficient * grad_p).to(p.dtype), (coefficient * grad_q).to(q.dtype), None
