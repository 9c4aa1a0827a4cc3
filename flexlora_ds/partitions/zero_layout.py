"""Where the training state lies inside each of DeepSpeed's optimizer wrappers (attribute names of 0.19.8)."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.shards import MASTER, Piece, Shards, SliceBounds, split_state


def stage_of_wrapper(wrapper: Any) -> int:
    """0 to 3, after checking that the wrapper is one whose state can be carried.

    Raises:
        UserError: DeepSpeed chose a wrapper that this package cannot rebuild.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return 3
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return 2 if wrapper.partition_gradients else 1
    if isinstance(wrapper, FP16_UnfusedOptimizer):
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


def shards_of_wrapper(wrapper: Any, stage: int) -> Shards:
    """A view of the training state at stages 1 to 3."""
    device = torch.device(get_accelerator().current_device_name())
    return _flat_groups(wrapper, device) if stage < 3 else _partitioned(wrapper, device)


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
