"""The optimizer that a script gets from the library: groups, ages, and what it refuses."""

from __future__ import annotations

import math

import pytest
from torch import nn

from flexlora_ds import FlexLoRAConfig, adapters, build_optimizer, inject_adapters
from flexlora_ds.errors import UserError


def model_with_head() -> tuple[nn.Module, nn.Linear, FlexLoRAConfig]:
    config = FlexLoRAConfig(rank=2, target_modules=("q", "v"), weight_decay=0.1)
    head = nn.Linear(8, 3)
    model = nn.ModuleDict({"q": nn.Linear(16, 8), "v": nn.Linear(8, 8), "head": head})
    inject_adapters(model, config)
    return model, head, config


def test_p_and_q_at_the_base_rate_and_lambda_at_its_own() -> None:
    model, _, config = model_with_head()
    optimizer = build_optimizer(model, config, lr=1e-3)
    layers = adapters(model).values()
    base, *of_lambda = optimizer.param_groups
    assert base["lr"] == 1e-3 and base["weight_decay"] == 0.0 and len(base["params"]) == 4
    assert {id(p) for g in of_lambda for p in g["params"]} == {id(layer.lam) for layer in layers}
    assert [g["lr"] for g in of_lambda] == [1e-3 * math.sqrt(8)]
    assert optimizer.per_element_age and not optimizer.sensitivity


def test_more_groups_keep_their_own_settings() -> None:
    model, head, config = model_with_head()
    head.requires_grad_(True)
    optimizer = build_optimizer(
        model, config, lr=1e-3, extra_groups=[{"params": head.parameters(), "lr": 1e-2}]
    )
    assert optimizer.param_groups[-1]["lr"] == 1e-2 and len(optimizer.param_groups[-1]["params"]) == 2


def test_what_it_refuses() -> None:
    model, head, config = model_with_head()
    with pytest.raises(UserError, match=r"no parameter of the group is trainable \(extra_groups, group 0\)"):
        build_optimizer(model, config, lr=1e-3, extra_groups=[{"params": head.parameters()}])
    with pytest.raises(UserError, match=r"no adapters \(build_optimizer\); call inject_adapters first"):
        build_optimizer(nn.Linear(2, 2), config, lr=1e-3)
