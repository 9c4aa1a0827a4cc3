"""Parameter groups: P and Q at the base learning rate, λ at its own, weight decay on λ alone."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from flexlora_ds.adapter.layer import AdaptedLinear, adapters
from flexlora_ds.config import FlexLoRAConfig


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
