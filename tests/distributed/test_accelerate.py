"""A loop of accelerate's around DeepSpeed, which steps the engine once an update: the same as a loop of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexlora_ds import FlexLoRAConfig, RankController, build_optimizer
from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes
from tests.helpers.trainer_worker import fresh_accelerate

STEPS, MICRO_STEPS = 12, 2
OPTIONS: dict[str, Any] = {
    "adjust_start": 1,
    "adjust_freeze": 1,
    "adjust_interval": 3,
    "orth_form": "norm",
    "orth_weight": 1.0,
}


def config() -> FlexLoRAConfig:
    return worker.configuration(**OPTIONS)


def settings(stage: int) -> dict[str, Any]:
    return tiny.ds_config(stage, gas=MICRO_STEPS)


def micro_batches(rows: list[list[int]]) -> list[list[list[int]]]:
    half = len(rows) // MICRO_STEPS
    return [rows[:half], rows[half:]]


def train(case: dict[str, Any]) -> dict[str, Any]:
    """By accelerate's loop, or by DeepSpeed's: losses, and ranks after each change."""
    tiny.start()
    model = tiny.adapted_llama(config())
    optimizer = build_optimizer(model, config(), lr=5e-3)
    loop = accelerated if case["accelerated"] else by_hand
    with fresh_accelerate(launched=True):
        return loop(model, optimizer, settings(case["stage"]))


def by_hand(model: Any, optimizer: Any, ds: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    controller = RankController(engine, config(), STEPS)
    losses, ranks = [], []
    for step, rows in enumerate(worker.batches(STEPS), 1):
        for part in micro_batches(rows):
            loss = tiny.token_loss(engine, part) / tiny.targets(part)
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        change = controller.after_step(step)
        ranks += [] if change is None else [change.ranks]
    return {"losses": losses, "ranks": ranks}


def accelerated(model: Any, optimizer: Any, ds: dict[str, Any]) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds))
    engine, optimizer = accelerator.prepare(model, optimizer)
    controller = RankController(engine, config(), STEPS)
    losses, ranks, step = [], [], 0
    for rows in worker.batches(STEPS):
        for part in micro_batches(rows):
            with accelerator.accumulate(engine):
                loss = tiny.token_loss(engine, part) / tiny.targets(part)
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                change = controller.after_step(step)
                ranks += [] if change is None else [change.ranks]
    return {"losses": losses, "ranks": ranks}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerates_loop_is_deepspeeds_with_accumulation_and_a_penalty(
    one_process: Processes, stage: int
) -> None:
    (found,) = one_process.run(train, {"stage": stage, "accelerated": True})
    (expected,) = one_process.run(train, {"stage": stage, "accelerated": False})
    assert found["ranks"] == expected["ranks"] and len(found["ranks"]) == 3
    assert torch.allclose(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-6)
