"""Compiled pieces of the base under DeepSpeed: the same losses, and no compilation for a rank change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes

STEPS = 9
CALENDAR = {"adjust_start": 2, "adjust_freeze": 0, "adjust_interval": 1, "schedule": "constant"}
"""Ranks change after every step from the third."""


def losses_and_compilations(case: dict[str, Any]) -> dict[str, Any]:
    """In each process: the losses of the same run without and with compiled pieces, and the graphs after each step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain, _ = _run(case, None)
    counters.clear()
    compiled, graphs = _run(case, case["backend"])
    return {"plain": plain, "compiled": compiled, "graphs": graphs}


def _run(case: dict[str, Any], backend: str | None) -> tuple[list[float], list[int]]:
    from torch._dynamo.utils import counters

    from flexlora_ds import RankController
    from launch.model.torch_compile import compile_pieces

    _, world = tiny.start()
    config = worker.configuration(dropout=0.2, **CALENDAR)
    model: Any = tiny.adapted_llama(config)
    if backend is not None:
        # Two norms and an MLP per layer, and the last norm.
        assert compile_pieces(model, backend) == 2 * 3 + 1
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ds = tiny.ds_config(case["stage"], world=world, gas=2, stage3_param_persistence_threshold=0)
    engine = tiny.make_engine(model.train(), config, ds)
    controller = RankController(engine, config, STEPS)
    torch.manual_seed(11)
    losses, graphs, changes = [], [], 0
    for step, rows in enumerate(worker.batches(STEPS), 1):
        losses.append(tiny.train_step(engine, rows))
        change = controller.after_step(step)
        changes += change is not None and bool(change.pruned)
        graphs.append(int(counters["stats"]["unique_graphs"]))
    engine.destroy()
    assert changes >= STEPS - 4
    return losses, graphs


def assert_same_and_compiled_once(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["compiled"] == pytest.approx(result["plain"], rel=1e-5)
        assert result["graphs"][1] == result["graphs"][-1] <= 4, (
            "compiled before the first rank change, then no more"
        )
        assert result["graphs"][-1] >= 2


def test_the_losses_stay_and_rank_changes_compile_nothing(one_process: Processes) -> None:
    case = {"stage": 3, "checkpointing": True, "backend": "aot_eager"}
    assert_same_and_compiled_once(one_process.run(losses_and_compilations, case, timeout=400))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_every_stage_and_backend(world: int, stage: int, checkpointing: bool, backend: str) -> None:
    case = {"stage": stage, "checkpointing": checkpointing, "backend": backend}
    with Processes(world, timeout=900) as processes:
        assert_same_and_compiled_once(processes.run(losses_and_compilations, case))
