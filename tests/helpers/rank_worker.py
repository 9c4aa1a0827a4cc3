"""What runs inside the test processes of `distributed/test_rank_changes.py`; every function returns JSON."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch

from benchmarks.traffic import Traffic
from flexlora_ds import FlexLoRAConfig, RankController, adapters
from flexlora_ds.importance import score_matrices
from flexlora_ds.partitions import MASTER, live_shards, resize
from flexlora_ds.partitions.fewer_launches import spare_launches
from flexlora_ds.rank_changes.orthogonalise import Orthogonaliser, orthogonalise
from flexlora_ds.rank_changes.spectra import read_lambdas
from flexlora_ds.worth import by_birth, rises_without, together
from tests.helpers import tiny

CALENDAR = {"adjust_start": 5, "adjust_freeze": 8, "adjust_interval": 10}  # due at 15, 25, 35, 45 of 60
TOTAL = 60
TORCH = "torch"
"""In place of a ZeRO stage: no DeepSpeed engine; alone, or in DistributedDataParallel."""


def configuration(**options: Any) -> FlexLoRAConfig:
    return FlexLoRAConfig(
        **{"rank": 4, "dropout": 0.0, "target_modules": "all-linear", **CALENDAR, **options}
    )


def setup(case: dict[str, Any], config: FlexLoRAConfig) -> tuple[Any, RankController]:
    _, world = tiny.start()
    dtype = case.get("dtype", "fp32")
    model = tiny.adapted_llama(config, dtype)
    ds = tiny.ds_config(case["stage"], dtype, world, case.get("gas", 1), **case.get("zero", {}))
    make = tiny.make_torch_engine if case["stage"] == TORCH else tiny.make_engine
    engine = make(model, config, ds, total=200)
    if case.get("spare"):
        spare_launches(engine)
    return engine, RankController(engine, config, case.get("total", TOTAL))


def batches(steps: int) -> list[list[list[int]]]:
    corpus = tiny.records(40)
    return [tiny.global_batch(s, 8, corpus) for s in range(1, steps + 1)]


def trajectory(case: dict[str, Any]) -> dict[str, Any]:
    """Losses of every step and ranks after every change."""
    engine, controller = setup(case, configuration(**case.get("options", {})))
    losses, ranks, margins, scores = [], [], [], {}
    for step, rows in enumerate(batches(case.get("steps", TOTAL)), 1):
        losses.append(tiny.train_step(engine, rows))
        if step in case.get("score_at", ()):
            scores[step] = score_matrices(
                read_lambdas(live_shards(engine), controller.layers), controller.config
            )
        change = controller.after_step(step)
        if change is not None:
            ranks.append(change.ranks)
            margins.append(change.score_margin)
    return {
        "losses": losses,
        "ranks": ranks,
        "margins": margins,
        "scores": list(scores.values()),
        "checksum": _checksum(engine),
    }


def _checksum(engine: Any) -> list[float]:
    """A fingerprint of every master, for comparing processes."""
    shards = live_shards(engine)
    return [float(whole.double().sum()) for _, whole in shards.read(list(shards.pieces), MASTER)]


def empty_plans(case: dict[str, Any]) -> dict[str, list[float]]:
    """20 losses after a rebuild that changes nothing, beside none and beside rebuilds that lose something."""
    results = {}
    for variant in case["variants"]:
        config = configuration(adjust_size=0)
        engine, controller = setup(case, config)
        losses = []
        for step, rows in enumerate(batches(30), 1):
            losses.append(tiny.train_step(engine, rows))
            controller.after_step(step)
            if step == 10 and variant != "none":
                resize(engine, {})
                _lose(engine, variant)
        results[variant] = losses[10:]
    return results


@torch.no_grad()
def _lose(engine: Any, variant: str) -> None:
    shards = live_shards(engine)
    for flat, scalars in zip(shards.flat_tensors, shards.scalars, strict=True):
        if variant == "without moments":
            flat["exp_avg"].zero_()
            flat["exp_avg_sq"].zero_()
        if variant == "without age":
            flat["age"].zero_()
            scalars["step"].zero_()
        if variant == "without masters":
            flat[MASTER].copy_(
                flat[MASTER].to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float16)
            )


def validation(engine: Any) -> float:
    """A loss that every process computes alike."""
    engine.eval()
    with torch.no_grad():
        rows = batches(1)[0]
        loss = float(tiny.token_loss(engine, rows)) / tiny.targets(rows)
    engine.train()
    return loss


def losses_around(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all changes, with the validation loss on both sides."""
    engine, controller = setup(case, configuration(**case.get("options", {})))
    controller.validate = lambda: validation(engine)
    found = []
    for step, rows in enumerate(batches(TOTAL), 1):
        tiny.train_step(engine, rows)
        change = controller.after_step(step)
        if change is not None:
            found.append(change.to_dict())
    return found


def whole_reads(case: dict[str, Any]) -> dict[str, float]:
    """The largest differences of masters read whole from the fp32 parameters that the model computes with."""
    import deepspeed

    engine, _ = setup(case, configuration())
    tiny.train_step(engine, batches(1)[0])
    shards = live_shards(engine)
    params = list(shards.pieces)
    reads = {
        "together": [whole.clone() for _, whole in shards.read(params, MASTER)],
        "alone": [whole.clone() for p in params for _, whole in shards.read([p], MASTER)],
    }
    with deepspeed.zero.GatheredParameters(params, enabled=case["stage"] == 3):
        return {
            name: max(float((p.data - whole).abs().max()) for p, whole in zip(params, found, strict=True))
            for name, found in reads.items()
        }


def regularised(case: dict[str, Any]) -> dict[str, float]:
    """The largest errors of one decoupled step of matrices of different ranks: masters, parameters, Gram matrices."""
    import deepspeed

    engine, controller = setup(case, configuration(orth_weight=0))
    for step, rows in enumerate(batches(16), 1):
        tiny.train_step(engine, rows)
        controller.after_step(step)
    layers = controller.layers
    assert len(set(controller.ranks.values())) > 1
    params = [p for layer in layers.values() for p in (layer.P, layer.Q)]

    def masters() -> list[torch.Tensor]:
        return [whole.cpu().double() for _, whole in live_shards(engine).read(params, MASTER)]

    before = masters()
    grams = _regularise(case, engine, layers)
    assert grams is not None
    after = masters()
    expected = []
    for p, q in zip(before[::2], before[1::2], strict=True):
        eye = torch.eye(len(q), dtype=q.dtype)
        expected += [p - 0.3 * p @ (p.T @ p - eye), q - 0.3 * (q @ q.T - eye) @ q]
    of_after = [g for p, q in zip(after[::2], after[1::2], strict=True) for g in (p.T @ p, q @ q.T)]
    with deepspeed.zero.GatheredParameters(params, enabled=case["stage"] == 3):
        computed_with = [p.data.cpu().double() for p in params]
    rounded = [m.to(params[0].dtype).double() for m in after]
    return {
        "masters": _largest(after, expected),
        "parameters": _largest(computed_with, rounded),
        "grams": _largest([g for gram in grams.values() for g in (gram.p, gram.q)], of_after),
        "moved": 1 / _largest(after, before),
    }


def _regularise(case: dict[str, Any], engine: Any, layers: Any) -> Any:
    """One decoupled step; where `kept`, by what it knows from the step before, of no strength, and before a rebuild."""
    if not case["kept"]:
        return orthogonalise(live_shards(engine), layers, 0.3, with_grams=True, stacked=case["stacked"])
    kept = Orthogonaliser(engine, layers, stacked=case["stacked"])
    kept.step(0.0)
    resize(engine, {})
    kept.step(0.0)
    return kept.step(0.3, with_grams=True)


def _largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def carried_state(case: dict[str, Any]) -> dict[str, float]:
    """Largest difference of any surviving element of any state across one change; must be 0."""
    config = configuration()
    engine, controller = setup(case, config)
    for step, rows in enumerate(batches(14), 1):
        tiny.train_step(engine, rows)
        controller.after_step(step)
    tiny.train_step(engine, batches(15)[14])
    before = _named_state(engine)
    lr = engine.basic_optimizer.param_groups[0]["lr"]
    counters = (engine.global_steps, engine.micro_steps, engine.global_samples)
    change = controller._change(15, 4)
    after = _named_state(engine)
    assert change.pruned and change.expanded
    worst = {
        "survivors": 0.0,
        "newborn state": 0.0,
        "lr": abs(engine.basic_optimizer.param_groups[0]["lr"] - lr),
    }
    worst["counters"] = float(counters != (engine.global_steps, engine.micro_steps, engine.global_samples))
    for name in before:
        gone = set(change.pruned) & {name.rsplit(".", 1)[0]}
        _compare(
            name, before[name], after[name], gone, name.rsplit(".", 1)[0] in change.expanded, worst, before
        )
    return worst


def _named_state(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    shards = live_shards(engine)
    names = {
        getattr(layer, role): f"{n}.{role}"
        for n, layer in adapters(engine.module).items()
        for role in ("P", "lam", "Q")
    }
    state: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names.values()}
    for key in shards.keys:
        for p, whole in shards.read(list(names), key):
            state[names[p]][key] = whole.clone()
    return state


def _compare(
    name: str,
    old: dict[str, torch.Tensor],
    new: dict[str, torch.Tensor],
    gone: set[str],
    grown: bool,
    worst: dict[str, float],
    everything: dict[str, dict[str, torch.Tensor]],
) -> None:
    axis = 1 if name.endswith(".P") else 0
    lam = everything[f"{name.rsplit('.', 1)[0]}.lam"][MASTER]
    keep = [i for i in range(len(lam)) if not (gone and i == int(lam.abs().argmin()))]
    assert set(old) == set(new) == {MASTER, "age", "exp_avg", "exp_avg_sq"}, set(new)
    for key in old:
        kept = old[key].index_select(axis, torch.tensor(keep, device=old[key].device))
        now = new[key].narrow(axis, 0, len(keep))
        worst["survivors"] = max(worst["survivors"], float((kept - now).abs().max()))
        assert new[key].shape[axis] == len(keep) + grown
        if grown and key != MASTER:
            newborn = new[key].narrow(axis, len(keep), 1)
            worst["newborn state"] = max(worst["newborn state"], float(newborn.abs().max()))


def many_changes(case: dict[str, Any]) -> dict[str, Any]:
    """Counts and resident memory over many changes, from change `settled` on."""
    config = configuration(
        adjust_start=0, adjust_freeze=0, adjust_interval=1, schedule="constant", adjust_size=3
    )
    changes, settled = case["changes"], case.get("settled", 50)
    engine, controller = setup({**case, "total": changes + 10}, config)
    counts, memory = [], {}
    identity = (id(engine.optimizer), id(engine.basic_optimizer), [id(p) for p in engine.module.parameters()])
    rows = batches(1)[0]
    moved = 0
    for step in range(1, changes + 1):
        tiny.train_step(engine, rows)
        change = controller.after_step(step)
        moved += len(change.pruned) if change else 0
        if step in (10, settled, changes):
            gc.collect()
            counts.append(_counts(engine))
            memory[step] = psutil.Process().memory_info().rss / 2**20
    same = identity == (
        id(engine.optimizer),
        id(engine.basic_optimizer),
        [id(p) for p in engine.module.parameters()],
    )
    return {
        "counts": counts,
        "grown_mib": memory[changes] - memory[settled],
        "moved": moved,
        "identity": same,
    }


def _counts(engine: Any) -> dict[str, int]:
    modules = list(engine.module.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    objects = [type(o) for o in gc.get_objects() if isinstance(o, type) is False]
    return {
        "module hooks": hooks,
        "parameters": sum(issubclass(t, torch.nn.Parameter) for t in objects),
        "optimizers": sum(issubclass(t, torch.optim.Optimizer) for t in objects),
        "wrappers": sum(t.__name__ == type(engine.optimizer).__name__ for t in objects),
        "gradient hooks": len(getattr(engine.optimizer, "_grad_acc_hooks", ())),
    }


def communication(case: dict[str, Any]) -> dict[str, Any]:
    """What collectives move in one rank change at stage 3 and in the steps around it, and the base's state."""
    engine, controller = setup(case, configuration(orth_form="squared"))
    for step, rows in enumerate(batches(14), 1):
        tiny.train_step(engine, rows)
        controller.after_step(step)
    with Traffic() as ordinary:
        tiny.train_step(engine, batches(15)[14])
    base = [p for p in engine.module.parameters() if not p.requires_grad and not p.ds_persist]
    with Traffic() as traffic:
        change = controller.after_step(15)
    assert change is not None and change.pruned
    with Traffic() as following:
        tiny.train_step(engine, batches(15)[14])
    return {
        "collectives of a step, before and after": (ordinary.count, following.count),
        "fetches ahead": engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace(),
        "moved": traffic.elements,
        "collectives": traffic.count,
        "touched": sum(whole_elements(controller, n) for n in {*change.pruned, *change.expanded}),
        "adapters": controller.trainable_parameters(),
        "parameters": 3 * len(controller.layers),
        "base": sum(p.ds_numel for p in base),
        "base gathered": sum(p.numel() > 0 for p in base),
    }


def whole_elements(controller: RankController, name: str) -> int:
    """The elements of P, λ and Q of one matrix, were its rank one larger than it is now."""
    return (controller.ranks[name] + 1) * (sum(controller.shapes[name]) + 1)


def penalty_gradient(case: dict[str, Any]) -> dict[str, list[float]]:
    """Losses with the penalty's closed form; compared with autograd's in the test."""
    engine, controller = setup(case, configuration(adjust_size=0, orth_form=case["form"], orth_weight=0.5))
    losses = []
    for step, rows in enumerate(batches(12), 1):
        losses.append(tiny.train_step(engine, rows))
        controller.after_step(step)
    return {"losses": losses, "orthogonality": [controller.orthogonality()]}


def weighed(case: dict[str, Any]) -> dict[str, Any]:
    """Rises of the loss without the directions of two changes and of both, in the engine and in a plain model."""
    options = {"adjust_start": 2, "adjust_interval": 3, "direction": case.get("direction", "both")}
    engine, controller = setup(case, configuration(**options))
    for step, rows in enumerate(batches(10), 1):
        tiny.train_step(engine, rows)
        controller.after_step(step)
    changes = by_birth(controller.births)
    groups = [*changes.values(), together(changes.values())]
    before = _everything(engine)
    rises = rises_without(engine, groups, lambda: validation(engine))
    failed = 0
    try:
        rises_without(engine, groups, lambda: 1 / 0)
    except ZeroDivisionError:
        failed = 1
    after = _everything(engine)
    return {
        "steps": list(changes),
        "rises": rises,
        "expected": _rises_of_plain_model(before, groups, controller),
        "failed": failed,
        "tensors": len(before),
        "changed": [key for key in before if not torch.equal(before[key], after[key])],
    }


def _everything(engine: Any) -> dict[str, torch.Tensor]:
    """Every bit of the adapters' training state, and of what the model computes with."""
    import deepspeed

    state = {
        f"{name} {key}": value
        for name, values in _named_state(engine).items()
        for key, value in values.items()
    }
    for name, layer in adapters(engine.module).items():
        wanted = [layer.P, layer.lam, layer.Q]
        with deepspeed.zero.GatheredParameters(wanted, enabled=hasattr(layer.lam, "ds_id")):
            state |= {
                f"{name}.{role} computed": p.detach().clone()
                for role, p in zip(("P", "lam", "Q"), wanted, strict=True)
            }
    return state


@torch.no_grad()
def _rises_of_plain_model(
    state: dict[str, torch.Tensor], groups: list[dict[str, list[int]]], controller: RankController
) -> list[float]:
    """The same of a base whose weights got s · P diag(λ) Q of the directions that are left, in float64."""
    rows = batches(1)[0]

    def loss(removed: dict[str, list[int]]) -> float:
        model = tiny.tiny_llama().double().eval()
        for name, layer in controller.layers.items():
            P, lam, Q = (state[f"{name}.{role} computed"].cpu().double() for role in ("P", "lam", "Q"))
            left = [i for i in range(len(lam)) if i not in removed.get(name, ())]
            update = P[:, left] @ torch.diag(lam[left]) @ Q[left]
            weight = model.get_submodule(name).weight
            weight.copy_(weight.to(controller.engine.module.dtype).double() + layer.scaling * update)
        return float(tiny.token_loss(model, rows)) / tiny.targets(rows)

    return [loss(group) - loss({}) for group in groups]
