"""Give parameters new shapes under a live engine: only the optimizer wrapper is built anew.

The `nn.Parameter` objects, the torch optimizer, the scheduler, the engine and the wrapper object itself keep their
identity, so whoever holds one goes on holding the right one. Nothing learnt is lost: every master weight and every
per-element state of what survives is written back bit for bit, and the step counts go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from unittest.mock import patch

import deepspeed.runtime.engine as engine_module
import deepspeed.runtime.zero.stage3 as stage3_module
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from flexlora_ds.errors import RunError
from flexlora_ds.host_memory import returning_large_blocks
from flexlora_ds.partitions.layout import live_shards, stage_of, trainable_groups
from flexlora_ds.partitions.shards import Shards
from flexlora_ds.partitions.states import allocate, flat_masters

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


class Edit(Protocol):
    """How one parameter changes."""

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The new shape."""

    def __call__(self, whole: Tensor, key: str) -> Tensor:
        """The new whole tensor of state `key` (fp32), the same on every process."""


def resize(engine: Any, edits: Mapping[nn.Parameter, Edit]) -> None:
    """Apply `edits` between two steps; collective. An empty mapping rebuilds everything and changes nothing.

    Raises:
        RunError: called inside a gradient accumulation window.
    """
    if engine.micro_steps % engine.gradient_accumulation_steps() != 0:
        raise RunError("ranks can change at a gradient accumulation boundary only; call after engine.step()")
    with returning_large_blocks():
        _resize(engine, edits)


def _resize(engine: Any, edits: Mapping[nn.Parameter, Edit]) -> None:
    groups = trainable_groups(engine)
    stage = stage_of(engine)
    _drop_gradients(groups)
    if stage == 3:
        engine.optimizer.parameter_offload.partition_all_parameters()
    old = live_shards(engine)
    carried = {name: vars(engine.optimizer)[name] for name in CARRIED if name in vars(engine.optimizer)}
    if stage == 0 and engine.optimizer is engine.basic_optimizer:
        _rebuild_plain(engine, edits, old)
    else:
        _rebuild_wrapper(engine, edits, groups, stage)
    vars(engine.optimizer).update(carried)
    _write_back(engine, edits, old)


def _drop_gradients(groups: list[list[nn.Parameter]]) -> None:
    for p in (p for group in groups for p in group):
        p.grad = None
        if hasattr(p, "grad_accum"):
            p.grad_accum = None


def _rebuild_plain(engine: Any, edits: Mapping[nn.Parameter, Edit], old: Shards) -> None:
    for p, edit in edits.items():
        _reset_gradient_accumulator(p)
        p.data = torch.zeros(edit.shape(old.shapes[p]), dtype=p.dtype, device=p.device)
        engine.basic_optimizer.state.pop(p, None)


def _rebuild_wrapper(
    engine: Any, edits: Mapping[nn.Parameter, Edit], groups: list[list[nn.Parameter]], stage: int
) -> None:
    wrapper, basic = engine.optimizer, engine.basic_optimizer
    offload = _take_down(wrapper, stage)
    for p, edit in edits.items():
        _reset_gradient_accumulator(p)
        (_reshape_partitioned if stage == 3 else _reshape)(p, edit)
    if stage in (1, 2):
        for p in (p for group in groups for p in group if p not in edits):
            p.data = p.data.clone()  # a view would keep the whole old flat buffer alive
    basic.state.clear()
    for group, params in zip(basic.param_groups, groups, strict=True):
        group["params"] = list(params)
    vars(wrapper).clear()
    if offload is not None:
        _mark_persistent_again(offload, edits)
        wrapper.initialize_ds_offload = lambda **_: offload
    with _constructing_in_place(wrapper):
        if stage == 0:
            engine.optimizer = engine._configure_fp16_optimizer(basic, _low_precision(groups))
        else:
            engine.optimizer = engine._configure_zero_optimizer(basic)
    vars(wrapper).pop("initialize_ds_offload", None)
    assert engine.optimizer is wrapper, "DeepSpeed built another wrapper object"
    if stage > 0 and engine._support_torch_style_backward:
        wrapper.register_grad_acc_post_hook(engine._backward_post_hook)


def _low_precision(groups: list[list[nn.Parameter]]) -> torch.dtype:
    return groups[0][0].dtype


def _take_down(wrapper: Any, stage: int) -> Any:
    """Remove the wrapper's hooks; returns what of it goes on living (ZeRO-3's parameter coordinator)."""
    if stage == 0:
        return None
    wrapper.unregister_grad_acc_post_hooks()
    if stage < 3:
        wrapper.destroy()
        wrapper._grad_acc_hooks.clear()
        return None
    # Not wrapper.destroy(): the modules' backward closures would go on calling the old coordinator.
    for hook in (*wrapper._grad_acc_hooks, *wrapper._leaf_module_hooks):
        hook.remove()
    coordinator = wrapper.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    return wrapper.parameter_offload


def _reset_gradient_accumulator(p: nn.Parameter) -> None:
    """Drop the autograd node that remembers the old shape; a graph that somebody still holds keeps it alive.

    `Variable.set_data` forgets it only where dtype or device changes, so the dtype changes for a moment.
    """
    data = p.data
    p.data = torch.empty(0, dtype=torch.float64, device=data.device)
    p.data = data


def _reshape(p: nn.Parameter, edit: Edit) -> None:
    if hasattr(p, "_hp_mapping"):
        p._hp_mapping = None
    p.data = torch.zeros(edit.shape(tuple(p.shape)), dtype=p.dtype, device=p.device)


def _reshape_partitioned(p: Any, edit: Edit) -> None:
    shape = torch.Size(edit.shape(tuple(p.ds_shape)))
    p.data = torch.zeros(shape, dtype=p.ds_tensor.dtype, device=p.device)
    p.ds_shape, p.ds_numel = shape, shape.numel()
    p.ds_tensor = p.ds_secondary_tensor = None
    p.ds_status = ZeroParamStatus.AVAILABLE
    p.partition()


def _mark_persistent_again(offload: Any, edits: Mapping[Any, Edit]) -> None:
    for p in edits:
        p.ds_persist = False  # marking only ever sets True
    offload.persistent_parameters = offload.mark_persistent_parameters(
        offload.param_numel_persistence_threshold, offload.model_persistence_threshold
    )


@contextmanager
def _constructing_in_place(wrapper: Any) -> Iterator[None]:
    """While active, the engine's own factory methods construct into the existing wrapper object.

    A new object would leave every other holder (accelerate's wrapper, user code, parameters' `_z3_optimizer`) with a
    dead one. The names replaced are those that `DeepSpeedEngine._configure_*_optimizer` calls (0.19.8).
    """

    def build(*args: Any, **kwargs: Any) -> Any:
        wrapper.__init__(*args, **kwargs)
        return wrapper

    with (
        patch.object(engine_module, "DeepSpeedZeroOptimizer", build),
        patch.object(engine_module, "FP16_UnfusedOptimizer", build),
        patch.object(stage3_module, "DeepSpeedZeroOptimizer_Stage3", build),
    ):
        yield


@torch.no_grad()
def _write_back(engine: Any, edits: Mapping[nn.Parameter, Edit], old: Shards) -> None:
    """Carry every key from the old layout into the new one, one key at a time."""
    for key in old.keys:
        allocate(engine, key)
    new = live_shards(engine)
    kept = [p for p in old.pieces if p not in edits]
    moved = list(edits) if _stays(engine) else list(old.pieces)
    for key in old.keys:
        if _stays(engine):
            for p in kept:
                _copy_piece(old, new, p, key)
        for p, whole in old.read(moved, key):
            value = edits[p](whole, key) if p in edits else whole
            new.write(p, key, value)
    _write_scalars(engine, old, new)


def _stays(engine: Any) -> bool:
    """Whether an untouched parameter's piece is the same before and after (not in the flat groups of stages 1, 2)."""
    return stage_of(engine) in (0, 3)


def _copy_piece(old: Shards, new: Shards, p: nn.Parameter, key: str) -> None:
    source, target = old.local(p, key), new.local(p, key)
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


def _write_scalars(engine: Any, old: Shards, new: Shards) -> None:
    """The step and whatever else is not per element: each flat takes it from the first parameter in it."""
    first: dict[int, nn.Parameter] = {}
    for p, piece in new.pieces.items():
        first.setdefault(piece.flat, p)
    for i, master in enumerate(flat_masters(engine)):
        scalars = old.scalars[old.pieces[first[i]].flat]
        state = engine.basic_optimizer.state
        if scalars or master in state:
            state[master].update({k: v.clone() if torch.is_tensor(v) else v for k, v in scalars.items()})
    if stage_of(engine) in (1, 2) and len(old.keys) > 1:
        engine.optimizer._lazy_init_hp_params_optimizer_state()
