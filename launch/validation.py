"""The validation loss: the same number on every process."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm

from launch.batches import ValidationBatches
from launch.methods import Method
from launch.run_folder import RunFolder
from launch.token_loss import takes_positions, token_loss


class Validator:
    """Computes Σ token losses / target tokens over the records held out; collective."""

    def __init__(
        self, engine: Any, method: Method, batches: ValidationBatches | None, device: torch.device
    ) -> None:
        self._engine = engine
        self._method = method
        self._batches = batches
        self._device = device
        self._at_positions = takes_positions(engine.module)

    def __bool__(self) -> bool:
        """Whether any records are held out."""
        return self._batches is not None

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss in evaluation mode (no dropout)."""
        assert self._batches is not None, "no records are held out"
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._batches:
            self._method.before_forward(batch, self._device)
            total += token_loss(self._engine, batch, self._device, at_positions=self._at_positions).double()
        self._engine.train()
        comm.all_reduce(total)
        return float(total) / self._batches.target_tokens

    def log(self, folder: RunFolder, step: int) -> None:
        """Validate and write the line, where records are held out."""
        if self:
            folder.log_validation(step, self())
