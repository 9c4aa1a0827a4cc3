"""Give parameters new shapes under a live engine: only what wraps the optimizer or the model is built anew.

The `nn.Parameter` objects, the torch optimizer, the scheduler, the engine and the wrapper object itself keep their
identity, so whoever holds one goes on holding the right one. Nothing learnt is lost: every master weight and every
per-element state of what survives is written back bit for bit, and the step counts go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexlora_ds.errors import RunError
from flexlora_ds.partitions.ddp import rebuild_reducer
from flexlora_ds.partitions.host_memory import returning_large_blocks
from flexlora_ds.partitions.layout import live_shards, stage_of, trainable_groups
from flexlora_ds.partitions.reshape import reset_gradient_accumulator
from flexlora_ds.partitions.shards import Shards
from flexlora_ds.partitions.torch_engine import TorchEngine
from flexlora_ds.partitions.transfer import Edit, write_back

CARRIED = (
    "loss_scaler",
    "dynamic_loss_scale",
    "loss_scale_config",
    "overflow",
    "custom_loss_scaler",
    "external_loss_scale",
    "micro_step_id",
    "clip_grad",
    "_global_grad_norm",
)
"""Attributes of a wrapper that are training state rather than layout."""


def resize(engine: Any, edits: Mapping[nn.Parameter, Edit]) -> None:
    """Apply `edits` between two steps; collective. An empty mapping rebuilds everything and changes nothing.

    Raises:
        RunError: called inside a gradient accumulation window.
    """
    require_boundary(engine)
    with returning_large_blocks():
        _resize(engine, edits)


def require_boundary(engine: Any) -> None:
    """Raise RunError inside a gradient accumulation window.

    Accelerate, and whoever calls `set_gradient_accumulation_boundary`, tells DeepSpeed which micro-step ends an update,
    and steps the engine once for it: the engine's own count is of updates then.
    """
    said = getattr(engine, "_is_gradient_accumulation_boundary", None)
    ends = engine.micro_steps % engine.gradient_accumulation_steps() == 0 if said is None else said
    if not ends:
        raise RunError(
            "ranks can change at a gradient accumulation boundary only",
            mend="call after_step once an update, after the engine.step() that ends it",
        )


def _resize(engine: Any, edits: Mapping[nn.Parameter, Edit]) -> None:
    groups = trainable_groups(engine)
    stage = stage_of(engine)
    _drop_gradients(groups)
    if stage == 3:
        from flexlora_ds.partitions.rebuild_zero import release

        release(engine.optimizer.parameter_offload, groups)
    old = live_shards(engine)
    if engine.optimizer is engine.basic_optimizer:
        _rebuild_plain(engine, edits, old)
    else:
        _rebuild_wrapped(engine, edits, groups, stage)
    write_back(engine, edits, old)


def _rebuild_wrapped(
    engine: Any, edits: Mapping[nn.Parameter, Edit], groups: list[list[nn.Parameter]], stage: int
) -> None:
    from flexlora_ds.partitions.rebuild_zero import rebuild_wrapper

    carried = {name: vars(engine.optimizer)[name] for name in CARRIED if name in vars(engine.optimizer)}
    rebuild_wrapper(engine, edits, groups, stage)
    vars(engine.optimizer).update(carried)


def _drop_gradients(groups: list[list[nn.Parameter]]) -> None:
    for p in (p for group in groups for p in group):
        p.grad = None
        if hasattr(p, "grad_accum"):
            p.grad_accum = None


def _rebuild_plain(engine: Any, edits: Mapping[nn.Parameter, Edit], old: Shards) -> None:
    for p, edit in edits.items():
        reset_gradient_accumulator(p)
        p.data = torch.zeros(edit.shape(old.shapes[p]), dtype=p.dtype, device=p.device)
        engine.basic_optimizer.state.pop(p, None)
    if isinstance(engine, TorchEngine) and engine.ddp is not None:
        rebuild_reducer(engine.ddp)


def forget_construction(engine: Any) -> None:
    """Before the first step, drop optimizer state that came from the construction of a wrapper alone.

    FP16_UnfusedOptimizer (stage 0 with bf16 or fp16; unfused_optimizer.py `initialize_optimizer_states`, 0.19.8) runs
    one step with zero gradients: the step count and every age would start at 1 at that stage only.
    """
    if engine.global_steps == 0 and engine.optimizer is not engine.basic_optimizer:
        engine.basic_optimizer.state.clear()
