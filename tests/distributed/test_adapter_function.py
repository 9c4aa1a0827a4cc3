"""The one node under DeepSpeed: it trains as the plain form, at every stage, with activation checkpointing or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes

STEPS = 5
LONG = 18
"""Steps of the long version, with a rank change after step 15."""


def losses_of_both_forms(case: dict[str, Any]) -> dict[str, list[float]]:
    """In each process: the losses of the same run in the node's form and in the plain one, dropout on."""
    return {form: _losses(case, plain=form == "plain") for form in ("node", "plain")}


def _losses(case: dict[str, Any], plain: bool) -> list[float]:
    from flexlora_ds import RankController
    from flexlora_ds.adapter.layer import forward_context

    rank, world = tiny.start()
    config = worker.configuration(dropout=0.2, **case.get("options", {}))
    model: Any = tiny.adapted_llama(config)
    forward_context(model).plain = plain
    if case.get("checkpointing"):
        reentrant = case["checkpointing"] == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ds = tiny.ds_config(case["stage"], world=world, gas=2, stage3_param_persistence_threshold=0)
    engine = tiny.make_engine(model.train(), config, ds)
    controller = RankController(engine, config, worker.TOTAL)
    torch.manual_seed(11 + rank)
    losses = []
    for step, rows in enumerate(worker.batches(case.get("steps", STEPS)), 1):
        losses.append(tiny.train_step(engine, rows))
        controller.after_step(step)
    engine.destroy()
    return losses


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_training_is_that_of_the_plain_form(world: int, stage: int, checkpointing: str | None) -> None:
    case = {"stage": stage, "checkpointing": checkpointing, "steps": LONG}
    with Processes(world, timeout=900) as processes:
        assert_equal(processes.run(losses_of_both_forms, case))


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_one_process_at_stage_3(one_process: Processes, checkpointing: str | None) -> None:
    assert_equal(
        one_process.run(losses_of_both_forms, {"stage": 3, "checkpointing": checkpointing}, timeout=400)
    )


def test_two_processes_at_stage_3_with_a_penalty_in_the_loss(two_processes: Processes) -> None:
    case = {"stage": 3, "checkpointing": "non-reentrant", "options": {"orth_form": "norm"}}
    assert_equal(two_processes.run(losses_of_both_forms, case, timeout=400))


def assert_equal(results: list[dict[str, list[float]]]) -> None:
    for losses in results:
        assert losses["node"] == pytest.approx(losses["plain"], rel=1e-4)
        assert len(set(losses["node"])) == len(losses["node"])
