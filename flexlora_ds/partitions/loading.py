"""Load a model under ZeRO-3 without any process ever holding it whole.

The model is built with `deepspeed.zero.Init`, which partitions each module's parameters as soon as they
exist; then every process goes through the safetensors shard by shard and copies its own part of each tensor
into its partition, without communication. Peak host memory per process: its partition + one (memory-mapped)
shard + the largest tensor. transformers' own ZeRO-3 path merges the full state in process 0 instead.

What cannot be read this way is loaded whole in each process and then partitioned: a GGUF file, a checkpoint
whose names or tensors transformers converts while it loads, partitions that are quantised, doubled (hpZ) or
on NVMe.

Read from DeepSpeed 0.19.8 and transformers 5.23.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.host_memory import returning_large_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@returning_large_blocks()
def load_partitioned(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    zero3: Mapping[str, Any],
    load_whole: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """The causal LM in `folder` (safetensors), its parameters partitioned over all processes, in `dtype`.

    `zero3` is the DeepSpeed configuration the engine will get; every process calls this. `load_whole` is
    used, and its result partitioned, where the checkpoint's tensors are not one to one the model's. Raises
    UserError if a tensor has the wrong shape, and what safetensors raises for a damaged file, on all
    processes alike.
    """
    shards = _read_headers(folder)
    model = _build_partitioned(folder, dtype, attention, zero3)
    slots = _slots(model)
    if not (_one_to_one(slots, shards) and all(_is_plain(slot) for slot in slots.values())):
        del model, slots
        return partition(load_whole(), zero3)
    _check_shapes(slots, shards)
    for shard, shapes in shards.items():
        _fill(slots, shard, list(shapes))
    return model


def partition(model: PreTrainedModel, zero3: Mapping[str, Any]) -> PreTrainedModel:
    """Partition a model that each process holds whole (process 0's count); buffers go to the device."""
    import deepspeed

    initialised = deepspeed.zero.Init(module=model, config_dict_or_path=dict(zero3))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(initialised.local_device)
    return model


def _build_partitioned(
    folder: Path, dtype: torch.dtype, attention: str, zero3: Mapping[str, Any]
) -> PreTrainedModel:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder)
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        # Without the dtype override, which would round the rotary frequencies: fp32 in every model.
        overrides = {DeepSpeedTensorOverride.device}
        stack.enter_context(deepspeed.zero.Init(config_dict_or_path=dict(zero3), tensor_overrides=overrides))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    gc.collect()  # a partitioned parameter is part of a cycle, so the head that tying replaced would stay
    return model.eval()


def require_same_dtype(dtype: torch.dtype, zero3: Mapping[str, Any]) -> None:
    """Raise UserError if the engine would train another dtype than the one that is loaded."""
    blocks = {"bf16": torch.bfloat16, "fp16": torch.float16}
    enabled = [block for block in blocks if zero3.get(block, {}).get("enabled")]
    if [blocks[block] for block in enabled] != ([] if dtype == torch.float32 else [dtype]):
        found = " and ".join(enabled) or "neither bf16 nor fp16"
        raise UserError(
            f"`dtype` is {dtype}, but the DeepSpeed configuration enables {found}", mend="let them agree"
        )


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by each of its names; tied ones share one tensor."""
    return dict(model.state_dict(keep_vars=True))


def _shard_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _read_headers(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """The tensors' shapes by name by shard; opening each file also checks that it is complete."""
    from safetensors import safe_open

    headers = {}
    for shard in _shard_files(folder):
        with safe_open(shard, framework="pt") as file:
            names = list(file.keys())
            headers[shard] = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return headers


def _one_to_one(slots: Mapping[str, Tensor], shards: Mapping[Path, Mapping[str, Any]]) -> bool:
    stored = [name for shapes in shards.values() for name in shapes]
    if len(stored) != len(set(stored)) or not set(stored) <= set(slots):
        return False
    filled = {id(slots[name]) for name in stored}
    return all(id(tensor) in filled for tensor in slots.values())


def _check_shapes(slots: Mapping[str, Tensor], shards: Mapping[Path, Mapping[str, tuple[int, ...]]]) -> None:
    for shard, shapes in shards.items():
        for name, shape in shapes.items():
            expected = tuple(getattr(slots[name], "ds_shape", slots[name].shape))
            if shape != expected:
                raise UserError(
                    f"{shard}: {name} is {shape}, but config.json makes it {expected}",
                    mend="fetch the model again",
                )


def _is_plain(slot: Any) -> bool:
    """Whether a partition is just this process's run of the flat tensor, in memory, in the same dtype."""
    if not hasattr(slot, "ds_id"):
        return True
    stored = slot.ds_tensor
    in_memory = stored.status == type(stored.status).AVAILABLE and stored.numel() == slot.partition_numel()
    return in_memory and stored.dtype == slot.dtype and slot.ds_secondary_tensor is None


@torch.no_grad()
def _fill(slots: Mapping[str, Any], shard: Path, names: list[str]) -> None:
    """Copy this process's part of one shard's tensors, one tensor at a time."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        for name in names:
            slot, whole = slots[name], file.get_tensor(name)
            if not hasattr(slot, "ds_id"):
                slot.copy_(whole)
                continue
            begin = slot.ds_zero_partition_rank * slot.ds_tensor.numel()
            mine = whole.view(-1)[begin : begin + slot.ds_tensor.numel()]  # the last part may be short
            slot.ds_tensor[: mine.numel()].copy_(mine)
