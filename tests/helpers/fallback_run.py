"""A run in which some processes cannot compile their layers: what runs inside test processes; all JSON."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny

STEPS = 4


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Gradient norms and warnings, where the processes `case["fails"]` have no compiler."""
    from flexlora_ds.adapter.layer import forward_context
    from launch.distributed.process import Process
    from launch.loop.compiled_layers import agree_on_layers
    from launch.model.compiled_blocks import compile_blocks

    rank, world = tiny.start()
    torch._dynamo.reset()
    config = worker.configuration(rank=2, dropout=0.0)
    model: Any = tiny.adapted_llama(config, "fp32", layers=3)
    backend: Any = _without_compiler if rank in case["fails"] else "aot_eager"
    assert compile_blocks(model, backend, or_plain=True) == 3
    ds = tiny.ds_config(2, world=world, reduce_bucket_size=300)
    engine = tiny.make_engine(model.train(), config, ds)
    corpus = tiny.records(40)

    def loss(step: int) -> Any:
        rows = tiny.global_batch(step, 4 * world, corpus)[rank::world]
        forward_context(model).row_keys = None
        return tiny.token_loss(engine, rows) / tiny.targets(rows)

    def compute_once() -> None:
        rows = corpus[:4]
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(tiny.token_loss(model, rows), trained)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        agree_on_layers(model, Process(rank, world, engine.device, 1), compute_once)
        norms = []
        for step in range(STEPS):
            engine.backward(loss(step))
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return {"norms": norms, "said": [str(w.message) for w in said if "not compiled" in str(w.message)]}


def _without_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("Python.h: no such file")
