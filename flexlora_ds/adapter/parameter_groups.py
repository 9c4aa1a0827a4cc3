"""The optimizer of adapters: P and Q at the base learning rate, λ at its own, weight decay on λ alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from flexlora_ds.adapter.layer import AdaptedLinear, adapters, require_in_place
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.optimizer import FlexLoRAAdamW


def build_optimizer(
    model: nn.Module,
    config: FlexLoRAConfig,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    extra_groups: Iterable[Mapping[str, Any]] = (),
) -> FlexLoRAAdamW:
    """AdamW over a model's adapters, as the method wants it: λ's own rate, and an age for each element.

    Args:
        model: what `inject_adapters` has adapted.
        lr: the learning rate of P and Q; λ's follows from it (`lambda_lr`).
        betas: decay of the first and second moment.
        eps: added to the denominator.
        extra_groups: parameter groups of what else is trained, such as a task's head; each may set its own `lr` and
            `weight_decay`. Their shapes never change.

    Raises:
        UserError: the model has no adapters, or was taken apart since; or an extra group has no trainable parameter.
    """
    if not adapters(model):
        raise UserError("the model has no adapters", "build_optimizer", "call inject_adapters first")
    require_in_place(model)
    groups = parameter_groups(model, config, lr)
    for number, group in enumerate(extra_groups):
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise UserError(
                "no parameter of the group is trainable",
                f"extra_groups, group {number}",
                "set requires_grad after inject_adapters, which freezes the base",
            )
        groups.append({"lr": lr, "weight_decay": 0.0, **group, "params": params})
    return FlexLoRAAdamW(
        groups,
        lr=lr,
        betas=betas,
        eps=eps,
        per_element_age=config.new_moment == "own_age",
        sensitivity=config.importance == "sensitivity",
    )


def lambda_factor(layer: AdaptedLinear, config: FlexLoRAConfig) -> float:
    """How many times the base learning rate λ gets.

    `auto` is √min(in, out): λ starts at 0 and Adam moves it by about lr a step, while LoRA's first step moves ΔW some
    0.6 · √out times as far.
    """
    if config.lambda_lr == "auto":
        return math.sqrt(min(layer.in_features, layer.out_features))
    return float(config.lambda_lr)


def parameter_groups(model: nn.Module, config: FlexLoRAConfig, lr: float) -> list[dict[str, Any]]:
    """Non-empty groups in a fixed order (DeepSpeed drops empty ones, and schedulers would then disagree)."""
    layers = adapters(model).values()
    groups: list[dict[str, Any]] = [
        {"params": [p for layer in layers for p in (layer.P, layer.Q)], "lr": lr, "weight_decay": 0.0}
    ]
    factors = sorted({lambda_factor(layer, config) for layer in layers})
    for factor in factors:
        params = [layer.lam for layer in layers if lambda_factor(layer, config) == factor]
        groups.append({"params": params, "lr": lr * factor, "weight_decay": config.weight_decay})
    return groups
