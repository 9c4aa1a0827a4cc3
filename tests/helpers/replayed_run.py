"""Packed runs whose layers run one by one, as one node, and replayed: what runs inside test processes; all JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.rerun import Rerun

STEPS, RECORDS = 14, 4
WAYS = ("one by one", "one node", "replayed")


def run_every_way(case: dict[str, Any]) -> dict[str, Any]:
    """In each process: the same run in `WAYS`, or in those that `case` names."""
    torch._dynamo.reset()
    return {way: run(case, way) for way in case.get("ways", WAYS)}


def run(case: dict[str, Any], way: str) -> dict[str, Any]:
    """Losses, ranks, gradients' checksum, replays and recordings of one run; a change after every fifth step."""
    from torch._dynamo.utils import counters

    from flexlora_ds import RankController
    from flexlora_ds.adapter.layer import forward_context
    from launch.data.batches import ProcessShare, TrainingBatches
    from launch.model.compiled_blocks import compile_blocks, layer_stack
    from launch.model.head_loss import install_head_loss
    from launch.model.token_loss import head_of, token_loss

    rank, world = tiny.start()
    torch.use_deterministic_algorithms(bool(case.get("deterministic")), warn_only=True)
    calendar = {"adjust_start": 3, "adjust_freeze": 0, "adjust_interval": 5, "schedule": "constant"}
    config = worker.configuration(rank=2, dropout=0.2, **{**calendar, **case.get("options", {})})
    model: Any = tiny.adapted_llama(config, "bf16", layers=3, **case.get("shape", {}))
    model.set_attn_implementation(attention())
    install_head_loss(model)
    compile_blocks(model, case["backend"], replayed=way != "one by one")
    engine = tiny.make_engine(
        model.train(), config, tiny.ds_config(case["stage"], "bf16", world=world, gas=2)
    )
    controller = RankController(engine, config, STEPS)
    stack = None if way == "one by one" else layer_stack(model)
    recorder = None
    if stack is not None and engine.device.type == "cpu" and way == "replayed":
        stack.recorder = recorder = Rerun()
    if stack is not None and engine.device.type == "cuda" and way == "one node":
        stack.recorder = Rerun(room=-1)
    share = ProcessShare(world, rank, RECORDS)
    data = TrainingBatches(examples(case), RECORDS * world * 2, 42, share, 0, padding_free=True)
    losses, ranks, replays, norms, changes = [], [], [], [], 0
    counters.clear()
    context, head = forward_context(model), head_of(model)
    for step in range(1, STEPS + 1):
        total = 0.0
        for batch in data.micro_batches(step):
            context.row_keys = batch.row_keys.to(engine.device)
            loss = token_loss(engine, batch, engine.device, head)
            engine.backward(loss * (2 / batch.target_tokens))
            engine.step()
            total += float(loss.detach())
        changes += controller.after_step(step) is not None
        losses.append(total)
        norms.append(float(engine.get_global_grad_norm() or 0))
        ranks.append(list(controller.ranks.values()))
        replays.append(0 if stack is None else stack.replays)
    found = {
        "losses": losses,
        "norms": norms,
        "ranks": ranks,
        "changes": changes,
        "replays": replays,
        "graphs": int(counters["stats"]["unique_graphs"]),
        "forgotten": recorder.forgotten if recorder else 0,
        "alike": stack is not None and bool(stack.alike),
    }
    torch.use_deterministic_algorithms(False)
    engine.destroy()
    return found


def attention() -> str:
    """The one for packed examples that a compiled layer takes: torch's own on a GPU."""
    if not torch.cuda.is_available():
        from tests.helpers.varlen_on_host import register

        return register()
    from launch.model.attention import torch_varlen
    from launch.model.packed_attention import register_packed_varlen

    varlen = torch_varlen("bf16")
    assert varlen is not None
    return register_packed_varlen(varlen)


def examples(case: dict[str, Any]) -> Any:
    """Of lengths whose sums round to a few values; targets in their second half."""
    from launch.data.examples import Examples

    rng = np.random.default_rng(0)
    lengths = rng.integers(*case.get("lengths", (20, 60)), 64)
    return Examples.pack(
        (i, rng.integers(1, tiny.VOCABULARY, n).astype(np.int32), np.arange(n) >= n // 2)
        for i, n in enumerate(lengths)
    )
