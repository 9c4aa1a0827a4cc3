"""What the regulariser keeps from step to step: never another master than the engine's, and no optimizer state."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from flexlora_ds import FlexLoRAConfig, RankController, TorchEngine, adapters, build_optimizer
from flexlora_ds.orthogonality import decoupled_step
from flexlora_ds.partitions import resize
from flexlora_ds.rank_changes.orthogonalise import Orthogonaliser
from tests.helpers import tiny

CONFIG = FlexLoRAConfig(rank=4, dropout=0.0, target_modules="all-linear")


def trained() -> TorchEngine:
    engine = TorchEngine(model := tiny.adapted_llama(CONFIG), build_optimizer(model, CONFIG, lr=1e-2))
    engine.backward(tiny.token_loss(engine, tiny.records(4)))
    engine.step()
    return engine


def first(engine: TorchEngine) -> nn.Parameter:
    return next(iter(adapters(engine.module).values())).P


def load_states(engine: TorchEngine) -> None:
    engine.optimizer.load_state_dict(copy.deepcopy(engine.optimizer.state_dict()))


def load_weights(engine: TorchEngine) -> None:
    engine.module.load_state_dict({n: 1.1 * t for n, t in engine.module.state_dict().items()})


def replace_data(engine: TorchEngine) -> None:
    for p in engine.module.parameters():
        p.data = 1.1 * p.data


def rebuild(engine: TorchEngine) -> None:
    resize(engine, {})


@pytest.mark.parametrize("between", [load_states, load_weights, replace_data, rebuild])
def test_it_writes_the_masters_that_there_are(between: Callable[[Any], None]) -> None:
    engine = trained()
    kept = Orthogonaliser(engine, adapters(engine.module))
    kept.step(0.1)
    between(engine)
    expected = decoupled_step(first(engine).detach().clone(), 0.1, tall=True)
    kept.step(0.1)
    assert torch.equal(first(engine).detach(), expected)


def test_two_on_one_engine_see_each_others_masters() -> None:
    engine = trained()
    one, other = (Orthogonaliser(engine, adapters(engine.module)) for _ in range(2))
    for kept in (one, other, one):
        expected = decoupled_step(first(engine).detach().clone(), 0.1, tall=True)
        kept.step(0.1)
        assert torch.equal(first(engine).detach(), expected)


def test_states_that_others_were_loaded_for_are_freed() -> None:
    engine = trained()
    kept = Orthogonaliser(engine, adapters(engine.module))
    kept.step(0.1)
    old = weakref.ref(engine.optimizer.state[first(engine)]["exp_avg"].untyped_storage())
    load_states(engine)
    gc.collect()
    assert old() is None


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: None,
    "falling": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "rising": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 + 10 * step),
    "one cycle": lambda optimizer: OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=8
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_is_the_weight_times_the_schedules_factor_and_never_overshoots(schedule: str) -> None:
    """Of OneCycleLR the factor is a share of its highest rate, not of the first, a twenty-fifth of it."""
    model = tiny.adapted_llama(CONFIG)
    optimizer = build_optimizer(model, CONFIG, lr=1e-3)
    engine = TorchEngine(model, optimizer, lr_scheduler=SCHEDULES[schedule](optimizer))
    controller = RankController(engine, CONFIG, 1000)
    layer = next(iter(adapters(model).values()))
    for step in range(1, 8):
        engine.backward(tiny.token_loss(engine, tiny.records(2)))
        engine.step()
        before = layer.P.detach().clone()
        eta = min(0.5, 0.05 * optimizer.param_groups[0]["lr"] / 1e-3)
        assert 0 < eta <= 0.5 and (schedule != "one cycle" or eta <= 0.05 + 1e-9)
        controller.after_step(step)
        expected = before - eta * before @ (before.T @ before - torch.eye(layer.rank))
        torch.testing.assert_close(layer.P.detach(), expected, rtol=1e-5, atol=1e-6)
