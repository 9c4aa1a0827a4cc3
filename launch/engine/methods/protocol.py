"""The interface of a training method, and what a run tells it before the model is adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from flexlora_ds.adapter_start import AdapterStart
from flexlora_ds.controller import RankController
from flexlora_ds.rank_changes.record import RankChange
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.engine.first_batches import FirstBatches

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Beginning:
    """Where a method begins."""

    batches: FirstBatches | None = None
    """Those of the run's first steps."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """`Method.constants` of the checkpoint that is continued; empty for a run that begins."""
    adapter: AdapterStart | None = None
    """The adapter that a run which begins goes on from."""


ANEW = Beginning()
"""A run that begins, of which no batches are known."""


class Method(Protocol):
    """One training method: built in the order of these functions."""

    matrices: list[str]
    remarks: list[str]
    """What is to be said of how the adapter began."""
    doubts: list[str]
    """What of that deserves a warning."""

    @property
    def controller(self) -> RankController | None:
        """What changes ranks, for the checkpoint; None where nothing does."""

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps beside the trained state, by name: on the CPU, the same on every process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside these and the controller's state; JSON."""

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after `step` from `state_dict()`; called after `attach`."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Freeze the base, add what is trained, return the model to train; collective."""

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters."""

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Begin to live with a DeepSpeed engine."""

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Called for every micro-batch just before the model sees it."""

    def after_step(self, step: int) -> RankChange | None:
        """Called once after every attempted update."""

    def orthogonality(self) -> float | None:
        """Mean ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F; None where there is nothing of the kind."""

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters now."""

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write what was trained, in the format of whoever loads it; collective.

        Returns:
            λ by matrix on process 0; empty without λ.
        """
