"""A loop of one's own in plain torch: the settings and the few steps that tests of unusual models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flexlora_ds import (
    FlexLoRAConfig,
    RankController,
    TorchEngine,
    build_optimizer,
)
from flexlora_ds.rank_changes.record import RankChange


def config(**options: Any) -> FlexLoRAConfig:
    calendar = {"adjust_start": 1, "adjust_freeze": 0, "adjust_interval": 1, "schedule": "constant"}
    given = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", **calendar, **options}
    return FlexLoRAConfig(**given)


def trained(
    model: nn.Module, settings: FlexLoRAConfig, loss: Callable[[Any], Tensor], steps: int = 4
) -> tuple[TorchEngine, RankController, list[RankChange]]:
    """A few steps with rank changes on an adapted model."""
    engine = TorchEngine(model, build_optimizer(model, settings, lr=1e-2))
    controller = RankController(engine, settings, steps + 1)
    changes = []
    for step in range(1, steps + 1):
        engine.backward(loss(engine))
        engine.step()
        changes.append(controller.after_step(step))
    return engine, controller, [change for change in changes if change is not None]
