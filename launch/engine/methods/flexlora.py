"""FlexLoRA: the method of this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.inject import inject_adapters
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.adapter.parameter_groups import build_optimizer
from flexlora_ds.controller import RankController
from flexlora_ds.gradient.growth import FOLDS
from flexlora_ds.rank_changes.record import RankChange
from flexlora_ds.saving import save_adapter
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.engine.adapter_start import doubts_of, line_of
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class FlexLoRA:
    """The method of this project."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.config = options.to_flexlora_config()
        self.matrices: list[str] = []
        self.remarks: list[str] = []
        self.doubts: list[str] = []
        self._controller: RankController | None = None

    @property
    def controller(self) -> RankController:
        """The rank controller, once there is an engine."""
        assert self._controller is not None, "attach(engine) comes first"
        return self._controller

    @property
    def constants(self) -> dict[str, Tensor]:
        """The controller's state says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The controller's state says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """The controller does it."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Inject the adapters in place, and begin with those that the run goes on from."""
        self.matrices = inject_adapters(model, self.config)
        if beginning.adapter is not None:
            beginning.adapter.prepare(model)
            self.remarks += [
                *beginning.adapter.remarks,
                line_of(beginning.adapter, self.options, self.matrices),
            ]
            self.doubts += doubts_of(beginning.adapter, self.options)
        return model

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """Our AdamW, with λ in groups of its own."""
        return build_optimizer(model, self.config, self.options.lr, betas=adam.betas, eps=adam.eps)

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Start the rank controller."""
        self._controller = RankController(engine, self.config, total_steps, validate)
        self._context = forward_context(engine.module)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Seed the dropout masks of this micro-batch, and say whose its rows are where gradients are looked at."""
        context = self._context
        context.row_keys = batch.row_keys.to(device, non_blocking=True)
        folds = None if context.observer is None else batch.folds_of_rows(FOLDS)
        context.row_folds = None if folds is None else folds.to(device)

    def after_step(self, step: int) -> RankChange | None:
        """Regularise, and change ranks where a change is due."""
        return self.controller.after_step(step)

    def orthogonality(self) -> float | None:
        """How far P and Q are from orthonormal; collective."""
        return self.controller.orthogonality()

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""
        return self.controller.total_rank

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters now."""
        return self.controller.trainable_parameters()

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write P diag(λ) Q of every matrix, from the fp32 masters, as a LoRA with rank and alpha patterns."""
        return save_adapter(
            self.controller.engine,
            folder,
            self.config,
            base_model=base_model,
            prompt=self.options.prompt,
            prompt_date=self.options.prompt_date,
        )
