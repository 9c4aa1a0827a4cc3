"""Thin products with ∂L/∂W of every adapted matrix, gathered in the backward pass beside the layers' own nodes.

A layer y = W x has ∂L/∂W = Σ g xᵀ over its rows, g = ∂L/∂y. So G Ωᵀ = Σ g (Ω x)ᵀ and Uᵀ G = Σ (Uᵀ g) xᵀ: both need
the rows that pass by and no weight, whatever the ZeRO stage. With activation checkpointing the node is built again in
the backward pass and runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import forward_context


class GradientProducts:
    """Sums over rows and backward passes, by matrix: G Ωᵀ [out, k] of right factors, Uᵀ G [l, in] of left ones.

    Args:
        shapes: (out, in) of each matrix.
        right: Ω [k, in] of each matrix; fp32. None: no such product is taken.
        left: U [out, l] of each matrix; fp32.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        right: Mapping[str, Tensor] | None = None,
        left: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.right, self.left = right or {}, left or {}
        self.of_right = {n: f.new_zeros(shapes[n][0], len(f)) for n, f in self.right.items()}
        """G Ωᵀ; zeros for a matrix that no row has passed."""
        self.of_left = {n: f.new_zeros(f.shape[1], shapes[n][1]) for n, f in self.left.items()}
        """Uᵀ G."""

    def attach(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """y [..., out] unchanged; its backward adds this call's part for the matrix `name`. x: [..., in]."""
        if name not in self.right and name not in self.left:
            return y
        # Nothing before this layer need ask for a gradient, and its own factors do not now.
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        out: Tensor = _Collect.apply(y, x, partial(self.add, name))  # type: ignore[no-untyped-call]
        return out

    def add(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add the rows of one backward: grad [n, out], x [n, in]."""
        grad, x = grad.float(), x.float()
        if name in self.right:
            self.of_right[name] += grad.T @ (x @ self.right[name].T)
        if name in self.left:
            self.of_left[name] += (grad @ self.left[name]).T @ x


class FoldedProducts:
    """The same sums for each of several parts of the records: what one part says can be checked on the others.

    Args:
        shapes, right, left: as `GradientProducts`, which all parts share.
        count: how many parts there are.
        folds_of: a layer's input [..., in] -> int64 [rows], the part that each of its rows belongs to.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        right: Mapping[str, Tensor],
        left: Mapping[str, Tensor],
        count: int,
        folds_of: Callable[[Tensor], Tensor],
    ) -> None:
        self.left = left
        self._parts = [GradientProducts(shapes, right=right, left=left) for _ in range(count)]
        self._folds_of = folds_of
        self._known: tuple[Tensor, list[Tensor]] | None = None

    def of_right(self, name: str) -> Tensor:
        """G Ωᵀ by part, [parts, out, k]."""
        return torch.stack([part.of_right[name] for part in self._parts])

    def of_left(self, name: str) -> Tensor:
        """Uᵀ G by part, [parts, l, in]."""
        return torch.stack([part.of_left[name] for part in self._parts])

    def attach(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """y [..., out] unchanged; its backward adds this call's rows to their parts. x: [..., in]."""
        add = partial(self._add, name, self._rows_of(x))
        out: Tensor = _Collect.apply(y, x, add)  # type: ignore[no-untyped-call]
        return out

    def _rows_of(self, x: Tensor) -> list[Tensor]:
        """The numbers of each part's rows. Found once for all layers: on a GPU the search waits for the device."""
        folds = self._folds_of(x)
        if self._known is None or self._known[0] is not folds:
            self._known = folds, [(folds == part).nonzero()[:, 0] for part in range(len(self._parts))]
        return self._known[1]

    def _add(self, name: str, rows: list[Tensor], grad: Tensor, x: Tensor) -> None:
        for part, of_part in zip(self._parts, rows, strict=True):
            part.add(name, grad.index_select(0, of_part), x.index_select(0, of_part))


class _Collect(torch.autograd.Function):
    """y [..., out], x [..., in]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
        return grad, None, None


@contextmanager
def collecting(model: nn.Module, products: GradientProducts) -> Iterator[None]:
    """Let every backward of `model` add to `products`, and to no parameter's gradient.

    What is trained, a head included, asks for no gradient meanwhile, so that an engine's own hooks, which would reduce
    it, do not run. The embedding's output, where a model has one, asks for one instead: every layer then takes part,
    also in ZeRO-3's release of weights.
    """
    context = forward_context(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    embedding = _embedding_of(model)
    hook = None if embedding is None else embedding.register_forward_hook(_ask_for_gradient)
    for p in trained:
        p.requires_grad_(False)
    former, context.observer = context.observer, products
    try:
        yield
    finally:
        context.observer = former
        for p in trained:
            p.requires_grad_(True)
        if hook is not None:
            hook.remove()


def _embedding_of(model: nn.Module) -> nn.Module | None:
    """The module that makes numbers of a model's input; None where it names none, as a module of one's own does."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # transformers' answer for a model of two towers
        return None
    return found if isinstance(found, nn.Module) else None


def _ask_for_gradient(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook. An output of several parts, such as patches with their sizes, begins with the values."""
    values = output[0] if isinstance(output, (tuple, list)) and output else output
    if torch.is_tensor(values) and values.is_floating_point():
        values.requires_grad_()
