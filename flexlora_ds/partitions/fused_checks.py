"""ZeRO's looks at the gradients on an accelerator, each in a few kernels instead of a dozen for every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


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
        flat = getattr(gradients, "flat_partition", None)
        if norm_type == 2 and flat is not None:
            norm = torch.linalg.vector_norm(flat, 2, dtype=torch.float64)
            return original([norm.reshape(1)], params, norm_type)
        held = [g.data for g in gradients if g.numel() and not getattr(g, "_zero_padding", False)]
        if norm_type != 2 or not held:
            return original(gradients, params, norm_type)
        norms = torch.stack(torch._foreach_norm(held, 2, dtype=torch.float64))
        return original([norms], params, norm_type)

    return norm


def overflow_of(groups: Iterable[Sequence[Tensor | None] | None]) -> Tensor:
    """Whether an element of any gradient is not finite, [1], left on the device."""
    held: list[Tensor] = []
    for group in groups:
        flat = getattr(group, "flat_partition", None)  # padding is zero, which is finite
        held += [flat] if flat is not None else [g for g in group or () if g is not None and g.numel()]
    if not held:
        return torch.zeros(1, dtype=torch.bool, device=get_accelerator().current_device_name())
    norms = torch._foreach_norm(held, float("inf"))
    return torch.isfinite(torch.stack(norms)).all().logical_not().reshape(1)
