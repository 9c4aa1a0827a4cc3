"""What a run needs of a device before its weights are loaded: shapes, memory at a micro-batch, the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexlora_ds.adapter.layer import check_rank, linear_names, linear_shapes, match_modules
from flexlora_ds.base_model.loading import load_skeleton
from launch.data.batch_layout import BatchLayout, batch_layout
from launch.engine.ds_config import load_ds_config
from launch.model.head_loss import chunk_rows, computes_losses
from launch.options.train_options import TrainOptions
from launch.planning.memory_estimate import MemoryEstimate, MemorySetting, ModelShape, estimate_memory
from launch.planning.page import trainable_parameters

USABLE = 0.9
"""The share of a GPU's memory that a run may plan with; the rest is the context, fragments and kernels' own."""


@dataclass(frozen=True)
class MemoryPlan:
    """A run's shapes and what they need."""

    options: TrainOptions
    processes: int
    settings: Mapping[str, Any]
    config: Any
    """transformers' configuration of the model."""
    base_parameters: int
    shapes: dict[str, tuple[int, int]]
    """(out, in) of every adapted layer."""

    def at(self, micro_batch: int) -> MemoryEstimate:
        """Bytes of one process at a micro-batch of the longest records."""
        options = self.options
        setting = MemorySetting.from_ds_config(
            self.settings,
            options.compute_dtype(),
            self.processes,
            gradient_checkpointing=options.gradient_checkpointing is True,
            loss_chunk=self._loss_chunk(),
            optimizer_states=5 if options.importance == "sensitivity" else 3,
        )
        copies = options.dropout > 0 and options.method == "lora"  # FlexLoRA's node keeps no dropped copy
        inputs = sum(into for _, into in self.shapes.values()) if copies else 0
        return estimate_memory(
            ModelShape.from_config(self.config, self.base_parameters),
            setting,
            trainable_parameters(self.shapes, options.rank, with_lambda=options.method == "flexlora"),
            micro_batch * options.cutoff_len,
            dropped_inputs=inputs,
        )

    def _loss_chunk(self) -> int | None:
        """Tokens whose logits exist at once; None if those of the whole micro-batch do."""
        if not computes_losses(self.config, fp16=self.options.compute_dtype() == "fp16"):
            return None
        return chunk_rows(self.config.vocab_size)

    @property
    def limit(self) -> float | None:
        """Bytes that a process may plan with; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        return USABLE * float(torch.cuda.get_device_properties(0).total_memory)

    def layout(self) -> BatchLayout:
        """The cut of the global batch: `auto` micro-batches are halved until they fit."""
        return batch_layout(self.options, self.processes, lambda micro: self.at(micro).total, self.limit)

    def settled(self) -> MemoryPlan:
        """With `gradient_checkpointing: auto` decided: on only where nothing fits without it."""
        if self.options.gradient_checkpointing != "auto":
            return self
        without = replace(self, options=self.options.replace(gradient_checkpointing=False))
        if without.layout().fits:
            return without
        return replace(self, options=self.options.replace(gradient_checkpointing=True))


def plan_memory(options: TrainOptions, processes: int) -> MemoryPlan:
    """Read the model's configuration and shapes, without weights.

    Raises:
        UserError: the model is missing or gated, a target matches nothing, the rank exceeds a layer's limit, or the
            DeepSpeed JSON is no good.
    """
    settings, _ = load_ds_config(options.ds)
    model = load_skeleton(options.model)
    parameters = sum(p.numel() for p in model.parameters())
    shapes = linear_shapes(model, match_modules(linear_names(model), options.target_modules))
    if options.method == "flexlora":
        check_rank(options.rank, shapes)
    return MemoryPlan(options, processes, settings, model.config, parameters, shapes).settled()
