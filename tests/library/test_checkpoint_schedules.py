"""A resume in a loop of one's own goes on with any of torch's learning-rate schedules, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torchs

from flexlora_ds import FlexLoRAConfig, RankController, TorchEngine, adapters, build_optimizer
from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.state import open_checkpoint, set_ranks, take_snapshot
from flexlora_ds.errors import RunError, UserError
from tests.helpers import tiny

STEPS, SAVED = 10, 5
CONFIG = FlexLoRAConfig(
    rank=4, dropout=0.0, target_modules="all-linear", adjust_start=1, adjust_freeze=1, adjust_interval=2
)


def sequence(optimizer: Any) -> Any:
    parts = [torchs.LinearLR(optimizer, 0.1, total_iters=3), torchs.CosineAnnealingLR(optimizer, 7)]
    return torchs.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: torchs.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "multiplicative": lambda optimizer: torchs.MultiplicativeLR(optimizer, lambda step: 0.9),
    "cosine": lambda optimizer: torchs.CosineAnnealingLR(optimizer, 7),
    "restarts": lambda optimizer: torchs.CosineAnnealingWarmRestarts(optimizer, 3),
    "steps": lambda optimizer: torchs.StepLR(optimizer, 3, 0.5),
    "one cycle": lambda optimizer: torchs.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=STEPS + 1
    ),
    "sequence": sequence,
}


def begun(
    schedule: Callable[[Any], Any], ranks: dict[str, int] | None = None
) -> tuple[TorchEngine, RankController]:
    model = tiny.adapted_llama(CONFIG)
    if ranks is not None:
        set_ranks(model, ranks)
    optimizer = build_optimizer(model, CONFIG, lr=1e-2)
    engine = TorchEngine(model, optimizer, lr_scheduler=schedule(optimizer))
    return engine, RankController(engine, CONFIG, STEPS)


def go_on(engine: TorchEngine, controller: RankController, steps: range) -> list[tuple[float, list[float]]]:
    """Loss, and the rates of all groups, of each step."""
    seen = []
    for step in steps:
        loss = tiny.token_loss(engine, tiny.global_batch(step, 4, tiny.records(20)))
        engine.backward(loss)
        seen.append((float(loss.detach()), [group["lr"] for group in engine.optimizer.param_groups]))
        engine.step()
        controller.after_step(step)
    return seen


def saved(root: Path, engine: TorchEngine, controller: RankController) -> Path:
    snapshot = take_snapshot(engine, SAVED, controller=controller, run={})
    part = files.begin(root, SAVED)
    return files.commit(part, snapshot.write(part))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resume_repeats_every_bit(schedule: str, tmp_path: Path) -> None:
    engine, controller = begun(SCHEDULES[schedule])
    go_on(engine, controller, range(1, SAVED + 1))
    folder = saved(tmp_path, engine, controller)
    expected = go_on(engine, controller, range(SAVED + 1, STEPS + 1))
    checkpoint = open_checkpoint(folder)
    resumed, its_controller = begun(SCHEDULES[schedule], checkpoint.ranks)
    checkpoint.restore(resumed, controller=its_controller)
    assert go_on(resumed, its_controller, range(SAVED + 1, STEPS + 1)) == expected
    assert its_controller.ranks == controller.ranks
    pairs = zip(adapters(engine.module).values(), adapters(resumed.module).values(), strict=True)
    assert all(torch.equal(one.P, other.P) and torch.equal(one.lam, other.lam) for one, other in pairs)


@pytest.mark.parametrize(("one", "other"), [("cosine", "lambda"), ("lambda", "cosine"), ("cosine", "steps")])
def test_a_resume_with_another_schedule_is_refused(one: str, other: str, tmp_path: Path) -> None:
    engine, controller = begun(SCHEDULES[one])
    go_on(engine, controller, range(1, SAVED + 1))
    checkpoint = open_checkpoint(saved(tmp_path, engine, controller))
    resumed, _ = begun(SCHEDULES[other], checkpoint.ranks)
    with pytest.raises(
        RunError, match=r"the checkpoint's schedule is a \w+LR, this one a \w+LR; resume with"
    ):
        checkpoint.restore(resumed)


def test_a_schedule_without_a_state_is_refused() -> None:
    class Own:
        """It steps, and says nothing."""

        def step(self) -> None: ...

    engine, controller = begun(lambda optimizer: Own())
    with pytest.raises(UserError, match="cannot carry the state of a Own; use torch's LambdaLR"):
        take_snapshot(engine, 1, controller=controller, run={})
