"""A run with whole layers compiled, beside the same without: what runs inside test processes; functions return JSON."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny

STEPS = 13
CALENDAR = {"adjust_start": 1, "adjust_freeze": 0, "adjust_interval": 1, "schedule": "constant"}
"""Ranks change after every step from the second."""


def run_beside_plain(case: dict[str, Any]) -> dict[str, Any]:
    """In each process: the same run without and with compiled layers, and the graphs after each step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = _run(case, None)
    counters.clear()
    compiled = _run(case, case["backend"])
    return {"plain": plain, "compiled": compiled, "breaks": dict(counters["graph_break"])}


def _run(case: dict[str, Any], backend: str | None) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    from flexlora_ds import RankController
    from flexlora_ds.adapter.layer import forward_context
    from launch.model.compiled_blocks import compile_blocks

    _, world = tiny.start()
    # Half of the matrices of rank 2 lose a direction at a time: many come down to 1.
    config = worker.configuration(rank=2, dropout=0.2, **{**CALENDAR, **case.get("options", {})})
    model: Any = tiny.adapted_llama(config, case.get("dtype", "fp32"), layers=3)
    model.set_attn_implementation("sdpa")
    if backend is not None:
        assert compile_blocks(model, backend, or_plain=True) == 3
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ds = tiny.ds_config(case["stage"], case.get("dtype", "fp32"), world=world, gas=2)
    engine = tiny.make_engine(model.train(), config, ds)
    controller = RankController(engine, config, STEPS)
    rng = torch.Generator().manual_seed(11)
    losses, graphs, ranks, changes = [], [], [], 0
    for step, rows in enumerate(worker.batches(STEPS), 1):
        rows[0], rows[-1] = (
            rows[0][:4],
            rows[-1][:4],
        )  # unequal in each micro-batch: no mask, another graph
        seeds = torch.randint(2**62, (len(rows), 16), generator=rng)
        losses.append(_step(engine, rows, seeds, forward_context(model)))
        changes += controller.after_step(step) is not None
        graphs.append(int(counters["stats"]["unique_graphs"]))
        ranks.append(list(controller.ranks.values()))
    worker.validation(engine)
    assert backend is None or not model.model.layers[0].forward.shared.plain
    found = {"losses": losses, "graphs": graphs, "ranks": ranks, "changes": changes}
    engine.destroy()
    return found


def _step(engine: Any, rows: list[list[int]], seeds: torch.Tensor, context: Any) -> float:
    """`tiny.train_step` in one process, with keys by record and position."""
    half, total = len(rows) // 2, 0.0
    for part, keys in ((rows[:half], seeds[:half]), (rows[half:], seeds[half:])):
        context.row_keys = keys[:, : max(map(len, part))].to(engine.device)
        loss = tiny.token_loss(engine, part)
        engine.backward(loss * (2 / tiny.targets(rows)))
        engine.step()
        total += float(loss.detach())
    return total / tiny.targets(rows)
