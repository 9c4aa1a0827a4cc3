"""Checkpoints in a loop of one's own in plain torch: found, checked, continued, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexlora_ds import (
    FlexLoRAConfig,
    RankController,
    TorchEngine,
    adapters,
    build_optimizer,
    find_checkpoint,
    inject_adapters,
    restore_checkpoint,
    save_adapter,
    save_checkpoint,
    set_ranks,
)
from flexlora_ds.checkpoint.adapter import read_checkpoint_adapter
from flexlora_ds.checkpoint.state import Checkpoint
from flexlora_ds.errors import CommandError, RunError, UserError
from flexlora_ds.peft_reading.plain import read_peft_adapter

STEPS = 12
CONFIG = FlexLoRAConfig(
    rank=3, dropout=0.0, target_modules="all-linear", adjust_start=1, adjust_freeze=1, adjust_interval=2
)


def made(checkpoint: Checkpoint | None = None) -> tuple[TorchEngine, RankController]:
    """A small model, at the place where the checkpoint was taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    inject_adapters(model, CONFIG)
    if checkpoint is not None:
        set_ranks(model, checkpoint.ranks)
    optimizer = build_optimizer(model, CONFIG, lr=1e-2)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    engine = TorchEngine(model, optimizer, lr_scheduler=falling)
    controller = RankController(engine, CONFIG, STEPS)
    if checkpoint is not None:
        restore_checkpoint(checkpoint, engine, controller)
    return engine, controller


def train(engine: TorchEngine, controller: RankController, until: int) -> list[float]:
    losses = []
    for step in range(controller.step + 1, until + 1):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (engine(x) - x[:, :6].sin()).pow(2).mean()
        engine.backward(loss)
        engine.step()
        controller.after_step(step)
        losses.append(loss.item())
    return losses


def values(engine: TorchEngine) -> dict[str, Any]:
    return {name: p.tolist() for name, p in engine.module.named_parameters() if p.requires_grad}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 5 and 8."""
    engine, controller = made()
    for until in (5, 8):
        train(engine, controller, until)
        save_checkpoint(engine, tmp_path, controller, run={"epoch": until})
    return tmp_path


def test_a_run_goes_on_bit_for_bit(saved: Path) -> None:
    engine, controller = made()
    losses = train(engine, controller, STEPS)
    checkpoint = find_checkpoint(saved)
    assert checkpoint is not None and (checkpoint.step, checkpoint.run["epoch"]) == (8, 8)
    later, follower = made(checkpoint)
    assert train(later, follower, STEPS) == losses[8:]
    assert values(later) == values(engine)
    assert len({layer.rank for layer in adapters(later.module).values()}) > 1, "ranks have moved"


def test_where_there_was_none_the_run_begins(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "nothing") is None


def test_a_damaged_one_is_passed_over_with_a_warning(saved: Path) -> None:
    damage(saved / "step_00000008")
    with pytest.warns(UserWarning, match="damaged checkpoint, the one before is taken: .*step_00000008"):
        checkpoint = find_checkpoint(saved)
    assert checkpoint is not None and checkpoint.step == 5


def test_where_all_are_damaged_no_run_begins_anew(saved: Path) -> None:
    for folder in saved.glob("step_*"):
        damage(folder)
    with pytest.raises(
        RunError, match=r"no valid checkpoint is left .*; restore one, or choose another folder"
    ):
        find_checkpoint(saved)


def damage(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))


def test_the_ranks_must_be_the_checkpoints(saved: Path) -> None:
    checkpoint = find_checkpoint(saved)
    assert checkpoint is not None
    engine, controller = made()
    before = values(engine)
    with pytest.raises(
        RunError, match=r"another model or method: .* is \[\d+, \d+\] in it and \[\d+, 3\] here"
    ):
        restore_checkpoint(checkpoint, engine, controller)
    assert values(engine) == before


@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        (replace(CONFIG, seed=7), STEPS, "seed is 42 in the checkpoint and 7 here"),
        (
            CONFIG,
            STEPS + 1,
            "of a run of 12 steps, this one has 13 .*; give RankController the same total_steps",
        ),
    ],
)
def test_another_run_does_not_go_on_from_it(
    config: FlexLoRAConfig, steps: int, words: str, saved: Path
) -> None:
    checkpoint = find_checkpoint(saved)
    assert checkpoint is not None
    engine, _ = made()
    set_ranks(engine.module, checkpoint.ranks)
    engine = TorchEngine(engine.module, build_optimizer(engine.module, config, lr=1e-2))
    with pytest.raises(UserError, match=words):
        restore_checkpoint(checkpoint, engine, RankController(engine, config, steps))


def test_its_adapter_is_exported_as_of_its_step(tmp_path: Path) -> None:
    engine, controller = made()
    train(engine, controller, 7)
    folder = save_checkpoint(engine, tmp_path / "checkpoints", controller, base_model="a base")
    save_adapter(engine, tmp_path / "adapter", CONFIG, base_model="a base", task_type=None)
    found, expected = read_checkpoint_adapter(folder), read_peft_adapter(tmp_path / "adapter")
    assert found.base_model == expected.base_model == "a base"
    assert set(found.matrices) == set(expected.matrices)
    for name, matrix in expected.matrices.items():
        assert torch.equal(found.matrices[name].A, matrix.A)
        assert torch.equal(found.matrices[name].B, matrix.B)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"flexlora": 1}, "'flexlora' is a name that the checkpoint uses itself .run.; choose another"),
        ({"loss": torch.zeros(1)}, "cannot write: Object of type Tensor is not JSON serializable; give JSON"),
        (
            {"loss": float("nan")},
            "cannot write: Out of range float values are not JSON compliant.*; give JSON",
        ),
    ],
)
def test_what_is_no_json_or_takes_a_name_is_refused(run: dict[str, Any], words: str, saved: Path) -> None:
    engine, controller = made(find_checkpoint(saved))
    train(engine, controller, 10)
    with pytest.raises(CommandError, match=words):
        save_checkpoint(engine, saved, controller, run=run)
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step_00000005", "step_00000008"]


@pytest.mark.parametrize("moment", ["write", "commit"])
def test_a_disk_that_refuses_leaves_the_earlier_ones(
    moment: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = find_checkpoint(saved)
    engine, controller = made(checkpoint)
    train(engine, controller, 10)
    fail_at(moment, monkeypatch)
    with pytest.raises(RunError, match=r"cannot write: No space left on device .*; free some space"):
        save_checkpoint(engine, saved, controller)
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step_00000005", "step_00000008"]


def fail_at(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "state.json")

    places: dict[str, Callable[[], None]] = {
        "write": lambda: monkeypatch.setattr("flexlora_ds.checkpoint.state.write_json", refuse),
        "commit": lambda: monkeypatch.setattr("flexlora_ds.checkpoint.files.write_json", refuse),
    }
    places[moment]()
