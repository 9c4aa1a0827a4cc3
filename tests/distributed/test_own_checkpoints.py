"""Checkpoints in a loop of one's own under DeepSpeed: the run goes on as if it had never stopped, also elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes

STEPS = 14
ROWS = 8


def train(case: dict[str, Any]) -> dict[str, Any]:
    """In each process: go on from the newest checkpoint of `folder`, where there is one, up to step `until`."""
    import deepspeed

    from flexlora_ds import (
        RankController,
        build_optimizer,
        find_checkpoint,
        inject_adapters,
        restore_checkpoint,
        save_checkpoint,
        set_ranks,
    )
    from flexlora_ds.partitions import MASTER, live_shards

    rank, world = tiny.start()
    config = worker.configuration(
        target_modules=("q_proj", "v_proj"), adjust_start=1, adjust_interval=3, dropout=0.0
    )
    model: Any = tiny.tiny_llama()
    checkpoint = find_checkpoint(case["folder"])
    inject_adapters(model, config)
    if checkpoint is not None:
        set_ranks(model, checkpoint.ranks)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config, lr=5e-3),
        config=tiny.ds_config(case["stage"], world=world),
    )
    controller = RankController(engine, config, total_steps=STEPS)
    done = 0
    if checkpoint is not None:
        restore_checkpoint(checkpoint, engine, controller)
        done = checkpoint.step
        assert checkpoint.run["drawn"] == 7 * done
    losses = []
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for step in range(done + 1, case["until"] + 1):
        ids = torch.randint(0, 90, (ROWS, 6), generator=torch.Generator().manual_seed(step))[mine]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        controller.after_step(step)
        losses.append(loss.item())
    if case["save"]:
        folder = save_checkpoint(engine, case["folder"], controller, run={"drawn": 7 * case["until"]}, keep=1)
        assert folder == Path(case["folder"]) / f"step_{case['until']:08d}"
    names = {p: n for n, p in engine.module.named_parameters() if p.requires_grad}
    masters = {names[p]: v.tolist() for p, v in live_shards(engine).read(list(names), MASTER)}
    return {"losses": losses, "ranks": controller.ranks, "masters": masters}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_bit_for_bit(stage: int, two_processes: Processes, tmp_path: Path) -> None:
    case = {"stage": stage, "folder": str(tmp_path / "none"), "until": STEPS, "save": False}
    whole = two_processes.run(train, case)
    case |= {"folder": str(tmp_path / "checkpoints"), "save": True}
    parts = [two_processes.run(train, {**case, "until": until}) for until in (4, 8, STEPS)]
    assert len(set(whole[0]["ranks"].values())) > 1, "ranks have moved"
    for rank, expected in enumerate(whole):
        assert [loss for part in parts for loss in part[rank]["losses"]] == expected["losses"]
        assert parts[-1][rank]["ranks"] == expected["ranks"]
        assert parts[-1][rank]["masters"] == expected["masters"]
    kept = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert kept == [f"step_{STEPS:08d}"], "the newest alone, as asked"


def save_what_is_no_json(folder: str) -> str:
    """In each process: what saving says where process 0 alone gives NaN."""
    import deepspeed

    from flexlora_ds import RankController, build_optimizer, inject_adapters, save_checkpoint
    from flexlora_ds.errors import RunError

    rank, world = tiny.start()
    config = worker.configuration(target_modules=("q_proj",))
    model: Any = tiny.tiny_llama()
    inject_adapters(model, config)
    optimizer = build_optimizer(model, config, lr=5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tiny.ds_config(2, world=world))
    try:
        run = {"loss": float("nan") if rank == 0 else 0.5}
        save_checkpoint(engine, folder, RankController(engine, config, STEPS), run=run)
    except RunError as error:
        return str(error)
    return "saved"


def test_a_fault_of_one_process_is_one_of_all(two_processes: Processes, tmp_path: Path) -> None:
    """The others would wait for it in the exchange that follows."""
    found = two_processes.run(save_what_is_no_json, str(tmp_path), timeout=60)
    assert all(text.startswith("cannot write: Out of range float") for text in found)
    assert not list(tmp_path.glob("*"))


def test_it_goes_on_at_another_stage_with_another_number_of_processes(
    one_process: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    case = {"stage": 0, "folder": str(tmp_path / "none"), "until": STEPS, "save": False}
    (whole,) = one_process.run(train, case)
    case |= {"folder": str(tmp_path / "checkpoints"), "save": True}
    two_processes.run(train, {**case, "stage": 3, "until": 7})
    (rest,) = one_process.run(train, case)
    assert rest["losses"] == pytest.approx(whole["losses"][7:], abs=2e-5)
    assert rest["ranks"] == whole["ranks"]
