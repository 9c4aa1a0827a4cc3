"""What runs inside the test processes of `distributed/test_gradient_start.py`; every function returns JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexlora_ds import FlexLoRAConfig, RankController, adapters, inject_adapters
from flexlora_ds.adapter.inject import linear_names
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.errors import UserError
from flexlora_ds.gradient.start import start_from_gradient
from flexlora_ds.partitions import MASTER, live_shards
from tests.helpers import tiny

BATCHES = 3


def configuration() -> FlexLoRAConfig:
    return FlexLoRAConfig(rank=4, dropout=0.0, target_modules="all-linear", adjust_size=0)


def rows_of(batch: int) -> list[list[int]]:
    """Records that are mostly two tokens in turn: a gradient with leading pairs."""
    rows = tiny.global_batch(batch, 8, tiny.records(40))
    return [[(5, 9)[i % 2] if i % 5 else token for i, token in enumerate(row)] for row in rows]


def started(case: dict[str, Any]) -> dict[str, Any]:
    """σ, P, Q and λ of every matrix after the start, and the losses before it, after it and of the steps behind it."""
    from deepspeed import comm

    rank, world = tiny.start()
    config, dtype = configuration(), case.get("dtype", "fp32")
    model: Any = tiny.tiny_llama(dtype)
    inject_adapters(model, config)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ds = tiny.ds_config(case["stage"], dtype, world, case.get("gas", 1), **case.get("zero", {}))
    engine = tiny.make_engine(model, config, ds)
    controller = RankController(engine, config, 20)

    def losses() -> Iterator[Tensor]:
        for batch in range(1, BATCHES + 1):
            rows = rows_of(batch)
            if case.get("broken") == batch:
                yield tiny.token_loss(engine.module, rows[rank::world]) * float("inf")
            yield tiny.token_loss(engine.module, rows[rank::world]) / tiny.targets(rows) / BATCHES

    def loss() -> float:
        with torch.no_grad():
            total = tiny.token_loss(engine, rows_of(1)[rank::world]).double().reshape(1)
        comm.all_reduce(total)
        return float(total)

    before = loss()
    found = start_from_gradient(engine, config, losses)
    after = loss()
    layers = adapters(engine.module)
    wanted = [p for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)]
    masters = {p: value.cpu().clone() for p, value in live_shards(engine).read(wanted, MASTER)}
    steps = []
    for step in range(1, 1 + case.get("steps", 0)):
        steps.append(tiny.train_step(engine, rows_of(step)))
        controller.after_step(step)
    return {
        "sigma": dict(found.sigma),
        "gaussian": list(found.gaussian),
        "before": before,
        "after": after,
        "P": {name: masters[layer.P].tolist() for name, layer in layers.items()},
        "Q": {name: masters[layer.Q].tolist() for name, layer in layers.items()},
        "lam": {name: masters[layer.lam].tolist() for name, layer in layers.items()},
        "steps": steps,
        "gradients": sum(p.grad is not None for p in engine.module.parameters()) if not steps else None,
    }


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """What a start says once the last two matrices have learnt, in this process's own words, and what it changed."""
    _, world = tiny.start()
    config = configuration()
    model: Any = tiny.tiny_llama()
    inject_adapters(model, config)
    engine = tiny.make_engine(model, config, tiny.ds_config(case["stage"], "fp32", world))
    layers = adapters(engine.module)
    for layer in list(layers.values())[-2:]:
        live_shards(engine).write(
            layer.lam, MASTER, torch.tensor([0.0, 0.0, 0.0, -1e-6], device=engine.device)
        )
    factors = [p for layer in layers.values() for p in (layer.P, layer.Q)]
    before = [value.clone() for _, value in live_shards(engine).read(factors, MASTER)]
    try:
        start_from_gradient(engine, config, lambda: iter([]))
    except UserError as error:
        said = str(error)
    after = [value for _, value in live_shards(engine).read(factors, MASTER)]
    equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"said": said, "kept": equal, "names": list(layers)}


def whole_gradients() -> dict[str, Tensor]:
    """∂L/∂W of every matrix by plain torch, float64: the mean of the losses per target token over the batches."""
    model: Any = tiny.tiny_llama().double()
    names = linear_names(model)
    for batch in range(1, BATCHES + 1):
        rows = rows_of(batch)
        (tiny.token_loss(model, rows) / tiny.targets(rows) / BATCHES).backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


GROWING = {
    "rank": 2,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "new_direction": "gradient",
    "direction": "expand",
    "adjust_size": 5,
    "adjust_start": 2,
    "adjust_freeze": 2,
    "adjust_interval": 3,
    "schedule": "constant",
}
"""In ten steps one change, after the fifth, with five new directions."""


def grown(case: dict[str, Any]) -> dict[str, Any]:
    """Losses, what each change gave birth to, and at one process the pairs of the whole gradient beside it."""
    rank, world = tiny.start()
    config = FlexLoRAConfig(**{**GROWING, **case.get("options", {})})
    dtype = case.get("dtype", "fp32")
    model: Any = tiny.tiny_llama(dtype)
    inject_adapters(model, config)
    ds = tiny.ds_config(case["stage"], dtype, world, case.get("gas", 1), **case.get("zero", {}))
    engine = tiny.make_engine(model, config, ds)

    def validate() -> float:
        with torch.no_grad():
            total = tiny.token_loss(engine, rows_of(99)[rank::world]).double().reshape(1)
        _all_reduce(total)
        return float(total)

    controller = RankController(engine, config, 10, validate)
    losses, changes = [], []
    for step in range(1, 11):
        rows = rows_of(step)
        due = case.get("compare") and step in (5,)
        exact = _present_gradients(engine, rows) if due else {}
        losses.append(tiny.train_step(engine, rows))
        change = controller.after_step(step)
        if change is not None:
            found = {"sigma": change.sigma, "expanded": change.expanded, "before": change.loss_before}
            changes.append({**found, "after": change.loss_after, **_newest(engine, change.expanded, exact)})
    return {"losses": losses, "changes": changes}


def priced(case: dict[str, Any]) -> dict[str, Any]:
    """∂L/∂λ of the living directions by the sketch of step 5, at stage 0 autograd's beside it, and what was traded."""
    _, world = tiny.start()
    options = {"importance": "growth", "direction": "both", "rank": 3, "adjust_freeze": 0}
    config = FlexLoRAConfig(**{**GROWING, **options, **case.get("options", {})})
    model: Any = tiny.tiny_llama()
    inject_adapters(model, config)
    ds = tiny.ds_config(case["stage"], "fp32", world, case.get("gas", 1))
    engine = tiny.make_engine(model, config, ds)
    controller = RankController(engine, config, 10)
    exact: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    changes = []
    for step in range(1, 11):
        rows = rows_of(step)
        if step == 5 and case["stage"] == 0:
            exact = _gradients_of_lambda(engine, rows)
        tiny.train_step(engine, rows)
        if step == 5:
            assert controller._sketch is not None
            controller._sketch.end()
            along = controller._sketch.living()
            scaling = config.alpha / config.rank
            found = {name: (scaling * value.sum(0)).tolist() for name, value in along.items()}
        change = controller.after_step(step)
        if change is not None:
            changes.append(change.to_dict())
    return {"exact": exact, "found": found, "changes": changes, "total": controller.total_rank}


def first_change(case: dict[str, Any]) -> dict[str, Any]:
    """σ of the directions born after step 1 behind a start from the gradient; ∂L/∂λ by the sketch and by autograd."""
    rank, world = tiny.start()
    options = {"init": "gradient", "importance": "growth", "adjust_start": 0, "adjust_interval": 1}
    config = FlexLoRAConfig(**{**GROWING, **options})
    model: Any = tiny.tiny_llama()
    inject_adapters(model, config)
    engine = tiny.make_engine(model, config, tiny.ds_config(case["stage"], "fp32", world))
    controller = RankController(engine, config, 10)
    rows = rows_of(1)
    own = rows[rank::world]
    start_from_gradient(
        engine, config, lambda: iter([tiny.token_loss(engine.module, own) / tiny.targets(rows)])
    )
    exact = _gradients_of_lambda(engine, rows) if case["stage"] == 0 else {}
    tiny.train_step(engine, rows)
    assert controller._sketch is not None
    controller._sketch.end()
    along = controller._sketch.living()
    found = {name: (config.scaling * value.sum(0)).tolist() for name, value in along.items()}
    change = controller.after_step(1)
    assert change is not None
    return {"exact": exact, "found": found, "market": change.to_dict()["market"], "sigma": change.sigma}


def continued(case: dict[str, Any]) -> list[str]:
    """What grew after step 5, at a controller that goes on after step 4 from a state that names no step."""
    _, world = tiny.start()
    config = FlexLoRAConfig(**GROWING)
    model: Any = tiny.tiny_llama()
    inject_adapters(model, config)
    engine = tiny.make_engine(model, config, tiny.ds_config(case["stage"], "fp32", world))
    controller = RankController(engine, config, 10)
    for step in range(1, 5):
        tiny.train_step(engine, rows_of(step))
        controller.after_step(step)
    state = {key: value for key, value in controller.state_dict().items() if key != "step"}
    forward_context(engine.module).observer = None
    controller = RankController(engine, config, 10)
    controller.load_state_dict(state)
    tiny.train_step(engine, rows_of(5))
    change = controller.after_step(5)
    assert change is not None
    return list(change.sigma)


def _gradients_of_lambda(engine: Any, rows: list[list[int]]) -> dict[str, list[float]]:
    layers, context = adapters(engine.module), forward_context(engine.module)
    observer, context.observer = context.observer, None
    loss = tiny.token_loss(engine.module, rows) / tiny.targets(rows)
    gradients = torch.autograd.grad(loss, [layer.lam for layer in layers.values()])
    context.observer = observer
    return {name: gradient.tolist() for name, gradient in zip(layers, gradients, strict=True)}


def _all_reduce(value: Tensor) -> None:
    from deepspeed import comm

    comm.all_reduce(value)


def _present_gradients(engine: Any, rows: list[list[int]]) -> dict[str, Tensor]:
    """∂L/∂W of every matrix at the present weights, by autograd on the base's own weights."""
    layers, context = adapters(engine.module), forward_context(engine.module)
    observer, context.observer = context.observer, None
    weights = [layer.base.weight.requires_grad_(True) for layer in layers.values()]
    loss = tiny.token_loss(engine.module, rows) / tiny.targets(rows)
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    context.observer = observer
    return dict(zip(layers, gradients, strict=True))


def _newest(engine: Any, names: list[str], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Of each newest direction: the largest product with the others, and how it compares with the exact pair."""
    layers = adapters(engine.module)
    wanted = [p for name in names for p in (layers[name].P, layers[name].Q)]
    masters = {p: value.double().cpu().clone() for p, value in live_shards(engine).read(wanted, MASTER)}
    overlap, compared = 0.0, []
    for name in names:
        P, Q = masters[layers[name].P], masters[layers[name].Q]
        overlap = max(overlap, float((P[:, :-1].T @ P[:, -1]).abs().max()))
        overlap = max(overlap, float((Q[:-1] @ Q[-1]).abs().max()))
        if exact:
            columns, rows = torch.linalg.qr(P[:, :-1])[0], torch.linalg.qr(Q[:-1].T)[0]
            G = exact[name].double().cpu()
            G = G - columns @ (columns.T @ G)
            left, sigma, right = torch.linalg.svd(G - (G @ rows) @ rows.T)
            cosines = [abs(float(left[:, 0] @ P[:, -1])), abs(float(right[0] @ Q[-1]))]
            compared.append([float(sigma[0]), float(sigma[1]), *cosines])
    return {"overlap": overlap, "compared": compared}
