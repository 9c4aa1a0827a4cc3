"""Give parameters new shapes under DeepSpeed's wrappers, which are constructed anew in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from flexlora_ds.partitions.fewer_launches import spare_launches, spares_launches
from flexlora_ds.partitions.rebuild_wrapper import constructing_in_place
from flexlora_ds.partitions.reshape import reset_gradient_accumulator
from flexlora_ds.partitions.transfer import Edit


def rebuild_wrapper(
    engine: Any, edits: Mapping[nn.Parameter, Edit], groups: list[list[nn.Parameter]], stage: int
) -> None:
    """Take the wrapper down, give the parameters of `edits` data of their new shapes, and construct it again."""
    wrapper, basic = engine.optimizer, engine.basic_optimizer
    spared = spares_launches(wrapper)
    offload = _take_down(wrapper, stage)
    for p, edit in edits.items():
        reset_gradient_accumulator(p)
        (_reshape_partitioned if stage == 3 else _reshape)(p, edit)
    basic.state.clear()
    for group, params in zip(basic.param_groups, groups, strict=True):
        group["params"] = list(params)
    vars(wrapper).clear()
    if offload is not None:
        _mark_persistent_again(offload, edits)
        wrapper.initialize_ds_offload = lambda **_: _standing_in(offload, groups)
    with constructing_in_place(engine):
        if stage == 0:
            engine.optimizer = engine._configure_fp16_optimizer(basic, _low_precision(groups))
        else:
            engine.optimizer = engine._configure_zero_optimizer(basic)
    vars(wrapper).pop("initialize_ds_offload", None)
    assert engine.optimizer is wrapper, "DeepSpeed built another wrapper object"
    if stage > 0 and engine._support_torch_style_backward:
        wrapper.register_grad_acc_post_hook(engine._backward_post_hook)
    if spared:
        spare_launches(engine)


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
    return wrapper.parameter_offload


def release(offload: Any, groups: list[list[nn.Parameter]]) -> None:
    """Partition the trainable parameters that are gathered, as ZeRO-3 keeps small ones; the base stays as it is.

    The coordinator's trace, the order of modules and parameters by which it fetches ahead, stays: it holds no sizes,
    and modules and Parameters keep their identity. Without it the next two steps would fetch every parameter when it
    is needed and not before (partitioned_param_coordinator.py, 0.19.8).
    """
    offload.get_param_coordinator()._clean_inflight_param_registry()
    parameters: list[Any] = [p for group in groups for p in group]
    for p in parameters:
        p.ds_active_sub_modules.clear()
        if p.ds_status == ZeroParamStatus.AVAILABLE:
            p.partition()


def _standing_in(offload: Any, groups: list[list[nn.Parameter]]) -> Any:
    """`offload`, after giving each trainable parameter its whole shape without its values.

    To register its gradient hooks the constructor gathers every parameter by itself and partitions it again
    (stage3.py `create_reduce_and_remove_grad_hooks`, 0.19.8). The hooks need no values, so one element stands for all,
    and nothing is communicated.
    """
    parameters: list[Any] = [p for group in groups for p in group]
    for p in parameters:
        p.data = torch.zeros(1, dtype=p.ds_tensor.dtype, device=p.device).expand(p.ds_shape)
        p.ds_status = ZeroParamStatus.AVAILABLE
    return offload


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
    """Whether ZeRO-3 keeps a resized parameter whole; a walk over the model only where that is another answer."""
    limit = offload.param_numel_persistence_threshold
    total = sum(p.ds_numel for p in offload.persistent_parameters)
    same = all(p.ds_persist == (p.ds_numel <= limit) for p in edits)
    if same and total <= offload.model_persistence_threshold:
        return
    for p in edits:
        p.ds_persist = False  # marking only ever sets True
    offload.persistent_parameters = offload.mark_persistent_parameters(
        limit, offload.model_persistence_threshold
    )
