"""Load a model under ZeRO-3 without any process ever holding it whole.

The model is built with `deepspeed.zero.Init`, which partitions each module's parameters as soon as they
exist; then every process goes through the safetensors shard by shard and copies its own part of each tensor
into its partition, without communication. Peak host memory per process: its partition + one (memory-mapped)
shard + the largest tensor. transformers' own ZeRO-3 path merges the full state in process 0 instead.

What cannot be read this way is loaded whole in each process and then partitioned: a GGUF file, a checkpoint
whose tensors transformers converts while it loads, partitions that are quantised, doubled (hpZ) or on NVMe.

Read from DeepSpeed 0.19.8 and transformers 5.23.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.host_memory import returning_large_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@returning_large_blocks()
def load_partitioned(
    shards: Mapping[Path, Mapping[str, str]],
    *,
    build: Callable[[], PreTrainedModel],
    zero3: Mapping[str, Any],
) -> PreTrainedModel | None:
    """The model that `build` makes, its parameters partitioned over all processes and filled from `shards`.

    None where a partition is not a process's run of the flat tensor in memory; nothing has been read then.

    Args:
        shards: for each safetensors file, the model's name of each stored tensor that is read: one for each distinct
            tensor of the model.
        build: makes the model's modules and ties them, with values that do not matter.
        zero3: the DeepSpeed configuration the engine will get; every process calls this.
    """
    model = _build_partitioned(build, zero3)
    gc.collect()  # a partitioned parameter is part of a cycle, so the head that tying replaced would stay
    slots = dict(model.state_dict(keep_vars=True))
    if not all(_is_plain(slot) for slot in slots.values()):
        return None
    for shard, places in shards.items():
        _fill({name: slots[place] for name, place in places.items()}, shard)
    return model.eval()


def partition(model: PreTrainedModel, dtype: torch.dtype, zero3: Mapping[str, Any]) -> PreTrainedModel:
    """Partition a model that each process holds whole (process 0's count); buffers go to the device.

    Parameters get `dtype`, as every other stage's engine gives them, also those that transformers keeps in fp32.
    """
    import deepspeed

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    initialised = deepspeed.zero.Init(module=model, config_dict_or_path=dict(zero3))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(initialised.local_device)
    return model


def _build_partitioned(build: Callable[[], PreTrainedModel], zero3: Mapping[str, Any]) -> PreTrainedModel:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
    from transformers.initialization import no_init_weights

    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        # Without the dtype override, which would round the rotary frequencies: fp32 in every model.
        overrides = {DeepSpeedTensorOverride.device}
        stack.enter_context(deepspeed.zero.Init(config_dict_or_path=dict(zero3), tensor_overrides=overrides))
        return build()


def require_same_dtype(dtype: torch.dtype, zero3: Mapping[str, Any]) -> None:
    """Raise UserError if the engine would train another dtype than the one that is loaded."""
    blocks = {"bf16": torch.bfloat16, "fp16": torch.float16}
    enabled = [block for block in blocks if zero3.get(block, {}).get("enabled")]
    if [blocks[block] for block in enabled] != ([] if dtype == torch.float32 else [dtype]):
        found = " and ".join(enabled) or "neither bf16 nor fp16"
        raise UserError(
            f"`dtype` is {dtype}, but the DeepSpeed configuration enables {found}", mend="let them agree"
        )


def _is_plain(slot: Any) -> bool:
    """Whether a partition is just this process's run of the flat tensor, in memory, in the same dtype."""
    if not hasattr(slot, "ds_id"):
        return True
    stored = slot.ds_tensor
    in_memory = stored.status == type(stored.status).AVAILABLE and stored.numel() == slot.partition_numel()
    return in_memory and stored.dtype == slot.dtype and slot.ds_secondary_tensor is None


@torch.no_grad()
def _fill(slots: Mapping[str, Any], shard: Path) -> None:
    """Copy this process's part of one shard's tensors, one tensor at a time; `slots` by stored name."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        for name, slot in slots.items():
            whole = file.get_tensor(name)
            if not hasattr(slot, "ds_id"):
                slot.copy_(whole)
                continue
            begin = slot.ds_zero_partition_rank * slot.ds_tensor.numel()
            mine = whole.view(-1)[begin : begin + slot.ds_tensor.numel()]  # the last part may be short
            slot.ds_tensor[: mine.numel()].copy_(mine)
