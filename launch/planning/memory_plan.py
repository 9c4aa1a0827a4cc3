"""What a run needs of a device before its weights are loaded, and the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexlora_ds.base_model.precision import Dtype
from launch.data.batch_layout import BatchLayout, batch_layout
from launch.engine.settled import Settled
from launch.model.head_loss import chunk_rows, computes_losses
from launch.model.skeleton import Skeleton
from launch.options.train_options import Kernels, TrainOptions
from launch.planning.memory_estimate import MemoryEstimate, MemorySetting, ModelShape, estimate_memory
from launch.planning.parameters import trained_at_start

USABLE = 0.9
"""The share of a GPU's memory that a run may plan with; the rest is the context, fragments and kernels' own."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs at a micro-batch, and the micro-batch that fits."""

    options: TrainOptions
    dtype: Dtype
    processes: int
    settings: Mapping[str, Any]
    """The DeepSpeed JSON, resolved or not."""
    skeleton: Skeleton
    gradient_checkpointing: bool
    kernels: Kernels = "none"
    compiled_layers: bool = False

    def at(self, micro_batch: int) -> MemoryEstimate:
        """Bytes of one process at a micro-batch of the longest records."""
        options, skeleton = self.options, self.skeleton
        setting = MemorySetting.from_ds_config(
            self.settings,
            self.dtype,
            self.processes,
            gradient_checkpointing=self.gradient_checkpointing,
            loss_chunk=self._loss_chunk(),
            fused_kernels=self.kernels == "liger",
            compiled_layers=self.compiled_layers,
            optimizer_states=5 if options.importance == "sensitivity" else 3,
        )
        copies = (
            options.dropout > 0 and not options.traits.changes_ranks and not options.traits.trains_base
        )  # FlexLoRA's node keeps no dropped copy
        inputs = sum(into for _, into in skeleton.shapes.values()) if copies else 0
        return estimate_memory(
            ModelShape.from_config(skeleton.text_config, skeleton.parameters),
            setting,
            trained_at_start(options, skeleton),
            micro_batch * options.cutoff_len,
            dropped_inputs=inputs,
            frozen_base=not options.traits.trains_base,
        )

    def _loss_chunk(self) -> int | None:
        """Tokens whose logits exist at once; None if those of the whole micro-batch do."""
        if self.options.traits.trains_base or not computes_losses(
            self.skeleton.config, fp16=self.dtype == "fp16"
        ):
            return None
        return chunk_rows(self.skeleton.vocabulary.outputs)

    @property
    def limit(self) -> float | None:
        """Bytes that a process may plan with; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        return USABLE * float(torch.cuda.get_device_properties(0).total_memory)

    def layout(self) -> BatchLayout:
        """The division of the global batch: `auto` micro-batches are halved until they fit."""
        return batch_layout(self.options, self.processes, lambda micro: self.at(micro).total, self.limit)


def memory_of(settled: Settled) -> MemoryPlan:
    """The plan of a run that has been settled."""
    computation = settled.computation
    return MemoryPlan(
        settled.options,
        computation.dtype,
        settled.layout.processes,
        settled.ds_config,
        settled.skeleton,
        computation.gradient_checkpointing,
        computation.kernels,
        computation.compiled_layers,
    )


def resolve_checkpointing(plan: MemoryPlan) -> bool:
    """Whether activations are recomputed; `auto` does so only where nothing fits without it.

    Args:
        plan: that of a run without it.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    asked = plan.options.gradient_checkpointing
    return not plan.layout().fits if asked == "auto" else asked
