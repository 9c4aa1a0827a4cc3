"""AdaLoRA's averages of |w ∂L/∂w|, kept by the optimizer itself, which has both at every ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

AVERAGE, DEVIATION = "sensitivity", "uncertainty"
"""The optimizer's states: of |w ∂L/∂w|, and of its distance from that average."""


@dataclass
class Averages:
    """Whether the optimizer keeps the averages at its next step."""

    active: bool = True


def average_after_step(optimizer: torch.optim.Optimizer, betas: tuple[float, float]) -> Averages:
    """Let an optimizer keep AdaLoRA's two averages of every element, as PEFT's `update_ipt` computes them.

    With w after the update and the gradient as the optimizer received it (averaged, unscaled, clipped):
    I ← β₁ I + (1 − β₁) |w g|, then U ← β₂ U + (1 − β₂) ||w g| − I|. Both are states of the parameter's shape, so ZeRO
    divides them and checkpoints hold them as they do Adam's moments. An update that is skipped changes neither.
    """
    averages = Averages()

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not averages.active:
            return
        for p in [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            state = optimizer.state[p]
            for key in (AVERAGE, DEVIATION):
                if key not in state:
                    state[key] = torch.zeros_like(p)
            now = (p * p.grad).abs()
            state[AVERAGE].mul_(betas[0]).add_(now, alpha=1 - betas[0])
            state[DEVIATION].mul_(betas[1]).add_((now - state[AVERAGE]).abs(), alpha=1 - betas[1])

    optimizer.register_step_post_hook(update)
    return averages
