"""Numbers that are not finite: every stage skips such an update, and each process can tell whether it was its own.

DeepSpeed's wrappers look at the reduced gradients and skip the update on all processes alike. Stage 0 in fp32 has no
wrapper: there torch's optimizer would apply it (engine.py `_take_model_step`, 0.19.8), unless it has an attribute
`overflow` that says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def skip_non_finite(engine: Any) -> None:
    """Make an engine without a wrapper (stage 0, fp32) skip an update whose gradients are not finite.

    The gradients are reduced by then, so every process decides alike, and the engine counts the step as skipped.
    """
    optimizer = engine.optimizer
    if optimizer is not engine.basic_optimizer:
        return
    apply = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer.overflow = not all_finite(
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )
        return None if optimizer.overflow else apply(*args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # `apply` is: torch's schedulers warn otherwise
    optimizer.overflow = False
    optimizer.step = step


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements are finite: one pass each, one answer from the device."""
    norms = torch._foreach_norm(list(tensors), float("inf"))
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())


class GradientProbe:
    """Sums of this process's own gradients, before they are reduced: a sum is finite where its terms are.

    One small reduction for each parameter and micro-step, left on the device. It cannot wait for one reduction of all
    at the end: autograd copies a gradient that somebody else holds (as many kernels again), and a view of one would be
    overwritten where DeepSpeed reduces in place (stage 0, and parameters larger than a bucket).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums: list[Tensor] = []
        trainable: list[Any] = [p for p in parameters if p.requires_grad]
        self._handles = [p.register_hook(self._note) for p in trainable]

    def take(self) -> Tensor | None:
        """The sum over the gradients since the last call; None where there were none."""
        sums, self._sums = self._sums, []
        return torch.stack(sums).sum() if sums else None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, gradient: Tensor) -> None:
        self._sums.append(gradient.sum(dtype=torch.float32))
