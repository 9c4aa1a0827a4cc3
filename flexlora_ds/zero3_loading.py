"""Load a model under ZeRO-3 without any process ever holding it whole.

The model is built with `deepspeed.zero.Init`, so that each module's parameters are partitioned as soon as they exist;
then process 0 reads the safetensors shard by shard, and each tensor goes through one gathered copy into everybody's
partition. Peak host memory per process: its partition + one (memory-mapped) shard + the largest tensor. transformers'
own ZeRO-3 path merges the full state in process 0 instead.

A GGUF file, or a checkpoint whose names or tensors transformers converts while it loads, cannot be read this way: it is
loaded whole in each process and then partitioned.

Read from DeepSpeed 0.19.8 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_partitioned(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    zero3: Mapping[str, Any],
    load_whole: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """The causal LM in `folder` (safetensors), its parameters partitioned over all processes, in `dtype`.

    `zero3` is the DeepSpeed configuration the engine will get; every process calls this. `load_whole` is used, and its
    result partitioned, where the checkpoint's tensors are not one to one the model's. Raises UserError if a tensor has
    the wrong shape, and what safetensors raises for a damaged file, on all processes alike and before any collective.
    """
    model = _build_partitioned(folder, dtype, attention, zero3)
    slots = _slots(model)
    shards = _read_headers(folder)
    if not _one_to_one(slots, shards):
        del model, slots
        return partition(load_whole(), zero3)
    _check_shapes(slots, shards)
    for shard, shapes in shards.items():
        _fill(slots, shard, list(shapes))
    return model


def partition(model: PreTrainedModel, zero3: Mapping[str, Any]) -> PreTrainedModel:
    """Partition a model that each process holds whole (process 0's weights count); buffers go to the device."""
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
        # Without the dtype override: it would round the rotary frequencies, which are fp32 whatever the model's dtype.
        overrides = {DeepSpeedTensorOverride.device}
        stack.enter_context(deepspeed.zero.Init(config_dict_or_path=dict(zero3), tensor_overrides=overrides))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    wrong = [name for name, parameter in model.named_parameters() if parameter.dtype != dtype]
    if wrong:
        raise UserError(
            f"the DeepSpeed configuration makes {wrong[0]} something else than {dtype}; let its bf16 and fp16 blocks agree with `dtype`"
        )
    return model.eval()


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by each of its names; tied ones share one tensor."""
    return dict(model.state_dict(keep_vars=True))


def _read_headers(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """The tensors' shapes by name by shard; opening each file also checks that it is complete."""
    from safetensors import safe_open

    headers = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            headers[shard] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
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
                    f"{shard}: {name} has shape {shape}, but config.json makes it {expected}; fetch the model again"
                )


def _fill(slots: Mapping[str, Tensor], shard: Path, names: list[str]) -> None:
    """Put one shard's tensors into the partitions, one tensor at a time; only process 0 reads the data."""
    import deepspeed
    from safetensors import safe_open

    reads = deepspeed.comm.get_rank() == 0
    with safe_open(shard, framework="pt") as file:
        for name in names:
            slot = slots[name]
            if not hasattr(slot, "ds_id"):
                slot.data.copy_(file.get_tensor(name))
                continue
            with deepspeed.zero.GatheredParameters([slot], modifier_rank=0):
                if reads:
                    slot.data.copy_(file.get_tensor(name))
