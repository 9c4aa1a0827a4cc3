"""Where the training state lies: in torch's optimizer alone, or inside one of DeepSpeed's wrappers (`zero_layout`).

`flat_masters` are the tensors that torch's optimizer updates; `allocate` makes optimizer states of their shape.
Nothing here imports DeepSpeed before there is a wrapper of its.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.shards import MASTER, Piece, Shards, SliceBounds, split_state
from flexlora_ds.partitions.torch_engine import TorchEngine


def stage_of(engine: Any) -> int:
    """0 to 3, after checking that the wrapper is one whose state can be carried; 0 without a wrapper.

    Raises:
        UserError: DeepSpeed chose a wrapper that this package cannot rebuild.
    """
    if engine.optimizer is engine.basic_optimizer:
        return 0
    from flexlora_ds.partitions.zero_layout import stage_of_wrapper

    return stage_of_wrapper(engine.optimizer)


def require_engine(engine: Any, place: str) -> None:
    """Raise UserError where something else stands for the engine, such as the model itself."""
    if not hasattr(engine, "basic_optimizer"):
        raise UserError(
            f"a {type(engine).__name__} is no engine",
            place,
            "give what deepspeed.initialize returned, or TorchEngine(model, optimizer)",
        )
    if engine.optimizer is None:
        raise UserError(
            "the engine has no optimizer", place, "give it build_optimizer(model, config) of this model"
        )


def trainable_groups(engine: Any) -> list[list[nn.Parameter]]:
    """The model's own trainable parameters by parameter group, in the optimizer's order."""
    wrapper, stage = engine.optimizer, stage_of(engine)
    if wrapper is engine.basic_optimizer:
        return [list(group["params"]) for group in wrapper.param_groups]
    if stage == 3:
        return [list(group["params"]) for group in wrapper.trainable_param_groups]
    groups = wrapper.bit16_groups if stage in (1, 2) else wrapper.fp16_groups
    return [list(group) for group in groups]


def loss_scale(engine: Any) -> float:
    """What the loss is multiplied by before the backward pass (1 without fp16)."""
    if isinstance(engine, TorchEngine):
        return engine.loss_scale()
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
    if stage == 0:
        return _replicated(engine)
    from flexlora_ds.partitions.zero_layout import shards_of_wrapper

    return shards_of_wrapper(engine.optimizer, stage)


def whereabouts(engine: Any) -> tuple[Any, ...]:
    """Where masters and parameters lie. As long as it is the same, a master of an earlier `live_shards` is the master.

    That holds for whoever keeps such a master: nothing else can come to lie in its place.
    """
    parameters = (getattr(p, "ds_tensor", p) for group in trainable_groups(engine) for p in group)
    return (
        *(master.data_ptr() for master in flat_masters(engine)),
        *((p.data_ptr(), p.shape) for p in parameters),
    )


def _replicated(engine: Any) -> Shards:
    """Every process holds everything: torch alone, DistributedDataParallel, stage 0."""
    plain = engine.optimizer is engine.basic_optimizer
    flat_tensors: list[dict[str, Tensor]] = []
    scalars, pieces, shapes = [], {}, {}
    masters = [p for g in engine.basic_optimizer.param_groups for p in g["params"]]
    _complete(engine.basic_optimizer, masters)
    originals = [p for group in trainable_groups(engine) for p in group]
    for p, master in zip(originals, masters, strict=True):
        elements, rest = split_state(engine.basic_optimizer.state.get(master, {}), master)
        pieces[p] = Piece(
            len(flat_tensors), 0, 0, master.numel(), SliceBounds(0, master.numel(), master.numel())
        )
        shapes[p] = tuple(master.shape)
        flat_tensors.append({MASTER: master.data.view(-1), **{k: v.view(-1) for k, v in elements.items()}})
        scalars.append(rest)
    device = masters[0].device
    return Shards(
        flat_tensors, scalars, pieces, shapes, device, replicated=True, masters_are_parameters=plain
    )


def _complete(optimizer: Any, masters: Sequence[Tensor]) -> None:
    """Give a parameter that no gradient has reached yet, such as a frozen one or an idle expert's, the state of step 0.

    Torch makes states at a parameter's first gradient; here every parameter has the same keys. Zeros are what it would
    begin with.

    Raises:
        UserError: parameters have different keys, as where an optimizer keeps rows and columns of some (Adafactor).
    """
    states = optimizer.state
    like = next((m for m in masters if states.get(m)), None)
    if like is None:
        return
    elements, rest = split_state(states[like], like)
    for master in masters:
        if states.get(master):
            if split_state(states[master], master)[0].keys() != elements.keys():
                raise UserError(
                    "the optimizer keeps states that are not of a parameter's shape, and ranks cannot change in them",
                    type(optimizer).__name__,
                    "use build_optimizer's",
                )
        else:
            states[master] = {k: torch.zeros_like(v) if torch.is_tensor(v) else 0 for k, v in rest.items()}
            states[master] |= {k: torch.zeros_like(master.data, dtype=v.dtype) for k, v in elements.items()}


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
            state[key] = torch.zeros_like(master.data, dtype=torch.promote_types(master.dtype, torch.float32))
