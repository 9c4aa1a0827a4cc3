"""One adapted layer with seeded values, its output and its gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.adapter.layer import AdaptedLinear


def seeded_normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, drawn in float64 whatever the dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted_layer(dtype: torch.dtype, p: float, features: int = 48, out: int = 40) -> AdaptedLinear:
    """One layer of rank 8 in training, whose λ is not zero and whose rows have keys."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, out)).to(dtype)
    config = FlexLoRAConfig(rank=8, dropout=p, target_modules=("0",))
    inject_adapters(model, config)
    layer = adapters(model.train())["0"]
    layer.lam.data.normal_()
    layer.context.row_keys = torch.arange(2 * 16).view(2, 16)
    return layer


def output_and_gradients(
    layer: AdaptedLinear, x: Tensor, *, plain: bool, around: Any = nullcontext
) -> dict[str, Tensor]:
    """The output and all gradients, for a loss that weighs every output differently."""
    layer.context.plain = plain
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with around():
        y = layer(x)
    (y * seeded_normal(*y.shape, dtype=y.dtype, seed=9)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
