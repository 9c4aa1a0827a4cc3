"""What a run is going to do, decided in one place and before the first weight: no `auto` is left after this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.data.batch_layout import BatchLayout
from launch.data.prepare import resolve_prompt
from launch.distributed.process import choose_accelerator
from launch.engine.ds_config import resolve_ds_config
from launch.engine.unsupported import require_dtype
from launch.model.attention import choose_padding_free
from launch.model.liger import choose_kernels
from launch.model.torch_compile import require_compiler, require_stage
from launch.options.train_options import TrainOptions
from launch.planning.memory_plan import MemoryPlan, plan_memory


@dataclass(frozen=True)
class Settled:
    """The decisions of one run; alike on all of its processes."""

    options: TrainOptions
    """Every option as this run uses it."""
    repeatable: TrainOptions
    """The same for `options.yaml`: what depends on this machine alone (micro-batch, kernels, packing) is as asked."""
    layout: BatchLayout
    """How a global batch is divided."""
    ds_config: Mapping[str, Any]
    """For `deepspeed.initialize`."""
    memory: MemoryPlan


def settle(options: TrainOptions, world_size: int) -> Settled:
    """Decide everything that can be decided without weights, and refuse what cannot run.

    Args:
        world_size: number of processes.

    Raises:
        UserError: an option cannot hold here, the model or the data is missing, or the DeepSpeed JSON
            contradicts the options.
    """
    options = resolve_prompt(options)
    memory = plan_memory(options.replace(dtype=options.compute_dtype()), world_size)
    repeatable, layout = memory.options, memory.layout()
    kernels = choose_kernels(repeatable, memory.config)
    require_compiler(repeatable, memory.config)
    packed = choose_padding_free(repeatable, memory.config)
    options = repeatable.replace(
        micro_batch_size=layout.micro_batch_size, kernels=kernels, padding_free=packed
    )
    ds_config = resolve_ds_config(options.ds, options, world_size, hidden_size=memory.config.hidden_size)
    require_stage(options, ds_config)
    choose_accelerator()
    require_dtype(options)
    return Settled(options, repeatable, layout, ds_config, memory)
