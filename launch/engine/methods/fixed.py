"""A method whose ranks our controller does not change, trained by torch's own AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.partitions import forget_construction
from flexlora_ds.rank_changes.record import RankChange
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class FixedMethod:
    """What such methods answer alike: a `launch.engine.methods.protocol.Method` but for `adapt` and `save`."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.matrices: list[str] = []
        self.remarks: list[str] = []
        self.doubts: list[str] = []

    @property
    def controller(self) -> None:
        """There is none of ours."""
        return None

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The trained state says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The trained state says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Nothing to continue."""

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """torch's AdamW over all that is trained."""
        params = [p for p in model.parameters() if p.requires_grad]
        options = self.options
        return torch.optim.AdamW(
            params, lr=options.lr, betas=adam.betas, eps=adam.eps, weight_decay=options.weight_decay
        )

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Remember the engine."""
        self.engine = engine
        forget_construction(engine)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Nothing is seeded by records: PEFT draws its dropout from torch's generator."""

    def after_step(self, step: int) -> RankChange | None:
        """Ranks never change."""
        return None

    def orthogonality(self) -> float | None:
        """There is no P and Q."""
        return None

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices; 0 where there are none."""
        return 0

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters, each counted once."""
        return sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad
        )
