"""A backward pass of which an engine notices nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def try_backward(engine: Any, loss: Tensor) -> None:
    """Compute the gradients of all trained parameters as a step does, and let go of them; at ZeRO-3 collective.

    `torch.autograd.grad` stops in front of the nodes that add to a parameter's gradient. DeepSpeed's hooks, which
    reduce and count, hang on these nodes or on the engine's own output, so `loss` comes from `engine.module`. ZeRO-3's
    hooks on modules run and gather as ever. What they leave gathered where a module's input asks for no gradient is
    released as `backward_epilogue` does it (stage3.py, 0.19.8).

    Up to stage 1 all gradients exist whole at the end, as in a step; from stage 2 on each is gone once it is known.
    """
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    handles = (
        [p.register_hook(_without_values) for p in trained] if engine.zero_optimization_stage() >= 2 else []
    )
    try:
        torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        offload.release_backward_leftovers()


def _without_values(gradient: Tensor) -> Tensor:
    """A gradient of that shape that takes no memory."""
    return gradient.new_zeros(1).expand_as(gradient)
