"""The same mechanisms on a GPU, where there is one: streams, NCCL, device copies."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flexlora_ds.dropout.mask import keep_mask, name_key
from launch.data.batches import ProcessShare, TrainingBatches
from launch.data.prefetch import training_feed
from tests.helpers import rank_worker as worker
from tests.helpers import tiny, twin
from tests.helpers.numbered_examples import make_examples, row_contents
from tests.helpers.processes import Processes, on_gpus

pytestmark = pytest.mark.gpu
DUE = {15: 4, 25: 4, 35: 3, 45: 2}


def test_the_dropout_mask_is_that_of_the_cpu() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    key = name_key("model.layers.3.mlp.up_proj")
    expected = keep_mask(keys, key, 4096, 0.05)
    assert torch.equal(keep_mask(keys.cuda(), key, 4096, 0.05).cpu(), expected)


@pytest.mark.parametrize("stage", range(4))
def test_ranks_and_losses_are_those_of_plain_torch_on_a_cpu(stage: int) -> None:
    config = worker.configuration()
    expected = twin.train(
        tiny.adapted_llama(config), config, worker.batches(60), DUE, lr=5e-3, total=200, eta=0.05
    )
    with Processes(1, timeout=300, env=on_gpus()) as processes:
        (result,) = processes.run(worker.trajectory, {"stage": stage})
    assert result["ranks"] == expected["ranks"]
    for ours, theirs in zip(result["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_survivors_and_empty_plans(stage: int) -> None:
    count = min(2, torch.cuda.device_count())
    with Processes(count, timeout=300, env=on_gpus(count)) as processes:
        for worst in processes.run(worker.carried_state, {"stage": stage, "dtype": "bf16"}):
            assert worst == {"survivors": 0.0, "newborn state": 0.0, "lr": 0.0, "counters": 0.0}
        case = {"stage": stage, "dtype": "bf16", "variants": ["none", "rebuilt", "without moments"]}
        (losses, *_) = processes.run(worker.empty_plans, case)
        assert losses["rebuilt"] == losses["none"] != losses["without moments"]


def losses_with_and_without_liger() -> list[list[float]]:
    """Three steps each, on one GPU."""
    from launch.model.liger import apply_liger

    tiny.start()
    config = worker.configuration()
    found = []
    for fused in (False, True):
        model = tiny.adapted_llama(config)
        if fused:
            apply_liger(model)
        engine = tiny.make_engine(model.train(), config, tiny.ds_config(3))
        found.append([tiny.train_step(engine, rows) for rows in worker.batches(3)])
        engine.destroy()
    return found


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_ligers_kernels_compute_what_the_base_does() -> None:
    with Processes(1, timeout=300, env=on_gpus()) as processes:
        ((plain, fused),) = processes.run(losses_with_and_without_liger)
    assert fused == pytest.approx(plain, rel=1e-4)


def test_pinned_batches_are_the_same() -> None:
    examples = make_examples([9, 3, 5, 8], [0, 0, 0, 0])
    batches = TrainingBatches(examples, 4, 1, ProcessShare(micro_batch_size=2), 7)
    expected = [batch for step in (1, 2) for batch in batches.micro_batches(step)]
    with training_feed(batches, 0, 2, torch.device("cuda", 0)) as feed:
        found = [micro_batch for batch in feed for micro_batch in batch.micro_batches]
    assert all(batch.input_ids.is_pinned() and batch.row_keys.is_pinned() for batch in found)
    assert [row_contents(batch) for batch in found] == [row_contents(batch) for batch in expected]
