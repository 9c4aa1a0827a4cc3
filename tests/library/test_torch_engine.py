"""`TorchEngine` with a gradient scaler: the same training, and a skipped update leaves everything as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora_ds import (
    FlexLoRAConfig,
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    rises_without,
)
from flexlora_ds.adapter.inject import use_fp32_adapters
from flexlora_ds.errors import UserError
from flexlora_ds.partitions import live_shards
from tests.helpers import tiny

STEPS = 8
CONFIG = FlexLoRAConfig(
    rank=4,
    dropout=0.0,
    target_modules="all-linear",
    adjust_start=1,
    adjust_freeze=2,
    adjust_interval=2,
    schedule="constant",
    importance="sensitivity",
    orth_form="norm",
)
"""Changes after steps 3 and 5; scores and a penalty that read gradients."""


def run(
    scaler: torch.amp.GradScaler | None, broken: tuple[int, ...], accumulation: int = 1
) -> dict[str, Any]:
    """Eight steps, of which the broken ones have a loss that is not finite."""
    model: Any = tiny.adapted_llama(CONFIG)
    optimizer = build_optimizer(model, CONFIG, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine = TorchEngine(
        model,
        optimizer,
        lr_scheduler=scheduler,
        accumulation_steps=accumulation,
        max_grad_norm=0.5,
        scaler=scaler,
    )
    controller = RankController(engine, CONFIG, STEPS)
    changes = []
    for step in range(1, STEPS + 1):
        for rows in (tiny.global_batch(10 * step + i, 4, tiny.records(20)) for i in range(accumulation)):
            loss = 16 * tiny.token_loss(engine, rows) / tiny.targets(rows)
            engine.backward(loss * float("inf") if step in broken else loss)
            engine.step()
        change = controller.after_step(step)
        if change is not None:
            changes.append((step, change.ranks))
    shards = live_shards(engine)
    state = {
        f"{name}.{part}.{key}": shards.local(p, key).clone()
        for name, layer in adapters(model).items()
        for part, p in zip("PλQ", (layer.P, layer.lam, layer.Q), strict=True)
        for key in shards.keys
    }
    return {
        "state": state,
        "changes": changes,
        "skipped": engine.skipped_steps,
        "steps": engine.global_steps,
        "lr": scheduler.last_epoch,
    }


def oldest(found: dict[str, Any]) -> float:
    ages: list[Tensor] = [value for key, value in found["state"].items() if key.endswith(".age")]
    return max(float(age.max()) for age in ages)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_scaler_changes_nothing_but_what_it_skips(accumulation: int) -> None:
    """A power of two is taken out exactly: every number is that of a run without a scaler that skips the same.

    The first scale overflows; step 3, after which ranks are to change, is broken by its loss.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=3)
    scaled = run(scaler, (3,), accumulation)
    plain = run(None, (1, 3), accumulation)
    assert (scaled["skipped"], scaled["steps"], scaled["lr"]) == (2, STEPS, STEPS - 2)
    assert {key: value for key, value in scaled.items() if key != "state"} == {
        key: value for key, value in plain.items() if key != "state"
    }
    assert [step for step, _ in scaled["changes"]] == [4, 5], "due after 3, which was skipped"
    assert oldest(scaled) == STEPS - 2
    for key, value in plain["state"].items():
        assert torch.equal(scaled["state"][key], value), key
    assert all(torch.isfinite(value).all() for value in scaled["state"].values())


def test_parameters_in_half_precision_are_warned_of() -> None:
    """Torch keeps no masters beside them; with adapters in fp32 nothing is said."""
    model = tiny.adapted_llama(CONFIG, "bf16")
    with pytest.warns(
        UserWarning, match=r"held in bfloat16, where most updates are lost: call .*use_fp32_adapters"
    ):
        TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-2))
    use_fp32_adapters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-2))


def test_directions_that_are_not_there_are_refused() -> None:
    model = tiny.adapted_llama(CONFIG)
    engine = TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-2))
    name = next(iter(adapters(model)))
    for group, said in (
        ({"nowhere": [0]}, r"no direction \[0\] of nowhere \(there is no such matrix\)"),
        ({name: [1, 4]}, rf"no direction \[1, 4\] of {name} \(it has 4\); take those of"),
        ({name: [-1]}, r"no direction \[-1\]"),
    ):
        with pytest.raises(UserError, match=said):
            rises_without(engine, [group], lambda: 0.0)
