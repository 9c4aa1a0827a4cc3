"""Numbers that are not finite: every stage skips such an update, and each process can tell whether it was its own.

DeepSpeed's wrappers look at the reduced gradients and skip the update on all processes alike. Stage 0 in fp32 has no
wrapper: there torch's optimizer would apply it (engine.py `_take_model_step`, 0.19.8), unless it has an attribute
`overflow` that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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


def fuse_gradient_checks(engine: Any) -> None:
    """Let ZeRO look at all gradients at once, on an accelerator: whether they are finite, and their norm.

    DeepSpeed 0.19.8 asks each gradient by itself, in a dozen kernels for the one and three for the other
    (stage_1_and_2.py `has_overflow_partitioned_grads_serial`, `get_grad_norm_direct`; stage3.py the latter). Of the
    15,081 kernels of a step with 480 adapter tensors they were 7,200; on a CPU a call costs next to nothing.
    """
    wrapper = engine.optimizer
    if torch.device(getattr(wrapper, "device", "cpu")).type == "cpu":
        return
    if hasattr(wrapper, "get_grad_norm_direct"):
        wrapper.get_grad_norm_direct = fused_norm(wrapper.get_grad_norm_direct)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper.has_overflow_partitioned_grads_serial = lambda: overflow_of(
            wrapper.averaged_gradients.values()
        )


def fused_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DeepSpeed's norm of the norms of all gradients, which is that of the gradients, accumulated in fp64 as theirs."""

    def norm(gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2) -> Tensor:
        held = [g.data for g in gradients if g.numel() and not getattr(g, "_zero_padding", False)]
        if norm_type != 2 or not held:
            return original(gradients, params, norm_type)
        norms = torch.stack(torch._foreach_norm(held, 2, dtype=torch.float64))
        return original([norms], params, norm_type)

    return norm


def overflow_of(groups: Iterable[Sequence[Tensor | None] | None]) -> Tensor:
    """Whether an element of any gradient is not finite, [1], left on the device."""
    held = [g for group in groups for g in group or () if g is not None and g.numel()]
    if not held:
        return torch.zeros(1, dtype=torch.bool, device=get_accelerator().current_device_name())
    norms = torch._foreach_norm(held, float("inf"))
    return torch.isfinite(torch.stack(norms)).all().logical_not().reshape(1)


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
