"""The flat masters of each of DeepSpeed's wrappers, and optimizer states of their shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlora_ds.partitions.layout import stage_of
from flexlora_ds.partitions.shards import MASTER


def flat_masters(engine: Any) -> list[Tensor]:
    """The tensors that the torch optimizer updates, in the order of `Shards.flats`."""
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
