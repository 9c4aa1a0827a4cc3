"""The whole training state of a live engine by name: out of it and into it, at any stage and number of processes.

A state's label is `<parameter>:<key>`: `model.layers.0.self_attn.q_proj.P:exp_avg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.partitions.layout import allocate, flat_masters, live_shards, stage_of, trainable_groups
from flexlora_ds.partitions.shards import MASTER, Shards

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""The engine's own counts."""

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def named_trainable(engine: Any) -> dict[str, nn.Parameter]:
    """The trainable parameters by their names in the engine's module, in the optimizer's order."""
    names = {p: name for name, p in engine.module.named_parameters()}
    return {names[p]: p for group in trainable_groups(engine) for p in group}


def label(name: str, key: str) -> str:
    """The name of one state in a file."""
    return f"{name}:{key}"


def split_label(text: str) -> tuple[str, str]:
    """A label's parameter and key."""
    name, _, key = text.rpartition(":")
    return name, key


@torch.no_grad()
def copy_share(engine: Any, index: int, count: int) -> dict[str, Tensor]:
    """Share `index` of `count` of all states, copied to the CPU by label; collective, no process holds everything.

    Parameter number i belongs to share i mod count. The step after it may begin at once.
    """
    shards = live_shards(engine)
    names = named_trainable(engine)
    mine = {p: name for i, (name, p) in enumerate(names.items()) if i % count == index}
    share = {}
    for key in shards.keys:
        for p, whole in shards.read(list(names.values()), key):
            if p in mine:
                share[label(mine[p], key)] = whole.detach().to("cpu", copy=True).contiguous()
    return share


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """The whole shape of every trainable parameter."""
    shapes = live_shards(engine).shapes
    return {name: list(shapes[p]) for name, p in named_trainable(engine).items()}


def state_keys(engine: Any) -> list[str]:
    """The keys of the per-element states that there are now: only the master before the first update."""
    return live_shards(engine).keys


def optimizer_scalars(engine: Any) -> dict[str, dict[str, float]]:
    """The optimizer states that are not per element (Adam's step), by parameter."""
    shards = live_shards(engine)
    return {
        name: {k: float(v) for k, v in shards.scalars[shards.pieces[p].flat].items()}
        for name, p in named_trainable(engine).items()
    }


@torch.no_grad()
def write_whole(
    engine: Any,
    keys: Iterable[str],
    tensors: Iterable[tuple[str, Tensor]],
    scalars: Mapping[str, Mapping[str, float]],
) -> None:
    """Write states (label, whole tensor) into an engine that has not taken a step; no communication.

    `keys` are the keys that the tensors bring; `scalars` is what `optimizer_scalars` gave.
    """
    for key in keys:
        allocate(engine, key)
    shards = live_shards(engine)
    names = named_trainable(engine)
    for text, whole in tensors:
        name, key = split_label(text)
        shards.write(names[name], key, whole)
    _write_scalars(engine, shards, names, scalars)


def _write_scalars(
    engine: Any,
    shards: Shards,
    names: Mapping[str, nn.Parameter],
    scalars: Mapping[str, Mapping[str, float]],
) -> None:
    masters = flat_masters(engine)
    written = set()
    for name, p in names.items():
        flat = shards.pieces[p].flat
        if flat in written or not scalars[name]:
            continue
        written.add(flat)
        state = engine.basic_optimizer.state[masters[flat]]
        for key, value in scalars[name].items():
            state[key] = torch.tensor(value, dtype=torch.float32)
    if stage_of(engine) in (1, 2) and written:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def counters(engine: Any) -> dict[str, int]:
    """The engine's counts of steps, samples and skipped steps."""
    return {name: int(getattr(engine, name)) for name in COUNTERS}


def set_counters(engine: Any, values: Mapping[str, int], micro_steps: int) -> None:
    """Continue the engine's counts; `micro_steps` is its own, for the accumulation may be another now."""
    for name in COUNTERS:
        setattr(engine, name, int(values[name]))
    engine.micro_steps = micro_steps


def scaler_state(engine: Any) -> dict[str, float | None] | None:
    """The dynamic loss scale and what it remembers; None where nothing is scaled."""
    scaler = _scaler(engine)
    if scaler is None:
        return None
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def set_scaler_state(engine: Any, state: Mapping[str, float | None] | None) -> None:
    """Continue a dynamic loss scale; fields that this stage's scaler does not have are left out."""
    scaler = _scaler(engine)
    if scaler is None or state is None:
        return
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(engine: Any) -> Any:
    """The object that holds a dynamic loss scale (attribute names of DeepSpeed 0.19.8)."""
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer or not getattr(wrapper, "dynamic_loss_scale", False):
        config = getattr(wrapper, "loss_scale_config", None)
        return config if getattr(config, "dynamic_loss_scale", False) else None
    return getattr(wrapper, "loss_scale_config", None) or wrapper.loss_scaler


__all__ = [
    "MASTER",
    "copy_share",
    "counters",
    "label",
    "named_trainable",
    "optimizer_scalars",
    "parameter_shapes",
    "scaler_state",
    "set_counters",
    "set_scaler_state",
    "split_label",
    "state_keys",
    "write_whole",
]
