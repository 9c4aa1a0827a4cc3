"""Where the training state lies inside each of DeepSpeed's optimizer wrappers (attribute names of 0.19.8).

`flat_masters` are the tensors that torch's optimizer updates; `allocate` makes optimizer states of their shape.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.shards import MASTER, Piece, Shards, SliceBounds, split_state


def stage_of(engine: Any) -> int:
    """0 to 3, after checking that the wrapper is one whose state can be carried.

    Raises:
        UserError: DeepSpeed chose a wrapper that this package cannot rebuild.
    """
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return 3
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return 2 if wrapper.partition_gradients else 1
    if isinstance(wrapper, FP16_UnfusedOptimizer) or wrapper is engine.basic_optimizer:
        return 0
    if isinstance(wrapper, BF16_Optimizer):
        raise UserError(
            "DeepSpeed chose its BF16_Optimizer (stage 1 with data_types.grad_accum_dtype fp32), "
            "whose state cannot be carried through rank changes",
            mend="use ZeRO stage 2, or leave grad_accum_dtype out",
        )
    raise UserError(
        f"cannot carry the training state of {type(wrapper).__name__}", mend="use AdamW at ZeRO stage 0 to 3"
    )


def trainable_groups(engine: Any) -> list[list[nn.Parameter]]:
    """The model's own trainable parameters by parameter group, in the optimizer's order."""
    wrapper, stage = engine.optimizer, stage_of(engine)
    if stage == 3:
        return [list(group["params"]) for group in wrapper.trainable_param_groups]
    if stage in (1, 2):
        return [list(group) for group in wrapper.bit16_groups]
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        return [list(group) for group in wrapper.fp16_groups]
    return [list(group["params"]) for group in wrapper.param_groups]


def loss_scale(engine: Any) -> float:
    """What the loss is multiplied by before the backward pass (1 without fp16)."""
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return 1.0
    scale = (
        wrapper.loss_scale_config.cur_scale if hasattr(wrapper, "loss_scale_config") else wrapper.loss_scale
    )
    return float(scale)


def live_shards(engine: Any) -> Shards:
    """A view of the training state as it lies now: it shares memory with the engine and ends at the next rebuild."""
    stage = stage_of(engine)
    device = torch.device(get_accelerator().current_device_name())
    if stage == 0:
        return _replicated(engine, device)
    return _flat_groups(engine.optimizer, device) if stage < 3 else _partitioned(engine.optimizer, device)


def _replicated(engine: Any, device: torch.device) -> Shards:
    wrapper = engine.optimizer
    fp32 = wrapper is engine.basic_optimizer
    flat_tensors: list[dict[str, Tensor]] = []
    scalars, pieces, shapes = [], {}, {}
    masters = [p for g in engine.basic_optimizer.param_groups for p in g["params"]]
    originals = [p for group in trainable_groups(engine) for p in group]
    for p, master in zip(originals, masters, strict=True):
        elements, rest = split_state(engine.basic_optimizer.state.get(master, {}), master)
        pieces[p] = Piece(
            len(flat_tensors), 0, 0, master.numel(), SliceBounds(0, master.numel(), master.numel())
        )
        shapes[p] = tuple(master.shape)
        flat_tensors.append({MASTER: master.data.view(-1), **{k: v.view(-1) for k, v in elements.items()}})
        scalars.append(rest)
    return Shards(flat_tensors, scalars, pieces, shapes, device, replicated=True, masters_are_parameters=fp32)


def _flat_groups(wrapper: Any, device: torch.device) -> Shards:
    flat_tensors: list[dict[str, Tensor]] = []
    scalars, pieces, shapes = [], {}, {}
    group = wrapper.real_dp_process_group[0]
    world, rank = comm.get_world_size(group=group), comm.get_rank(group=group)
    for i, master in enumerate(wrapper.single_partition_of_fp32_groups):
        elements, rest = split_state(wrapper.optimizer.state.get(master, {}), master)
        flat_tensors.append({MASTER: master.data, **elements})
        scalars.append(rest)
        width = master.numel()
        for p, begin in zip(
            wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i], strict=True
        ):
            bounds = SliceBounds(begin, p.numel(), width)
            start, length = bounds.run(rank)
            pieces[p] = Piece(i, begin + start - rank * width if length else 0, start, length, bounds)
            shapes[p] = tuple(p.shape)
    return Shards(flat_tensors, scalars, pieces, shapes, device, group, world, rank)


def _partitioned(wrapper: Any, device: torch.device) -> Shards:
    flat_tensors: list[dict[str, Tensor]] = []
    scalars, pieces, shapes, low_precision = [], {}, {}, {}
    group, world, rank = None, 1, 0
    for i, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        elements, rest = split_state(wrapper.optimizer.state.get(master, {}), master)
        flat_tensors.append({MASTER: master.data, **elements})
        scalars.append(rest)
        group = wrapper.sub_group_process_groups[i]  # DeepSpeed asserts that a sub-group has one
        world, rank = comm.get_world_size(group=group), comm.get_rank(group=group)
        for p in wrapper.fp16_groups[i]:
            flat, offset, padded = wrapper.grad_position[wrapper.get_param_id(p)]
            assert flat == i, "ZeRO-3 keeps a parameter's gradient in its own sub-group"
            bounds = SliceBounds(0, p.ds_numel, padded)
            pieces[p] = Piece(i, offset, *bounds.run(rank), bounds)
            shapes[p] = tuple(p.ds_shape)
            low_precision[p] = p.ds_tensor.data.view(-1)
    return Shards(
        flat_tensors, scalars, pieces, shapes, device, group, world, rank, low_precision=low_precision
    )


def flat_masters(engine: Any) -> list[Tensor]:
    """The tensors that the torch optimizer updates, in the order of `Shards.flat_tensors`."""
    wrapper, stage = engine.optimizer, stage_of(engine)
    if stage == 0:
        return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    return list(
        wrapper.fp32_partitioned_groups_flat if stage == 3 else wrapper.single_partition_of_fp32_groups
    )


def allocate(engine: Any, key: str) -> None:
    """Make zeros for one per-element state where there is none, or none of the master's shape."""
    if key == MASTER:
        return
    for master in flat_masters(engine):
        state = engine.basic_optimizer.state[master]
        if key not in state or state[key].shape != master.shape:
            state[key] = torch.zeros_like(master.data)
