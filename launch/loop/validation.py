"""The validation loss: the same number on every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm

from launch.data.batches import ValidationBatches
from launch.distributed.agreement import on_first
from launch.distributed.process import Process
from launch.engine.methods import Method
from launch.model.token_loss import head_of, token_loss
from launch.run_folder.folder import RunFolder


class Validator:
    """Computes Σ token losses / target tokens over the records held out; collective."""

    def __init__(
        self,
        engine: Any,
        method: Method,
        batches: ValidationBatches | None,
        process: Process,
        interrupted: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._method = method
        self._batches = batches
        self._process = process
        self._device = process.device
        self._interrupted = interrupted
        self._head = head_of(engine.module)

    def __bool__(self) -> bool:
        """Whether there is anything to validate on."""
        return self._batches is not None

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss in evaluation mode (no dropout); NaN where the run is told to stop meanwhile."""
        assert self._batches is not None, "no records are held out"
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._batches:
            if self._interrupted():
                total += float("nan")
                break
            self._method.before_forward(batch, self._device)
            total += token_loss(self._engine, batch, self._device, self._head).double()
        self._engine.train()
        comm.all_reduce(total)
        return float(total) / self._batches.target_tokens

    def log(self, folder: RunFolder, step: int) -> None:
        """Validate and write the line, where records are held out and none stops it."""
        if self:
            loss = self()
            if not self._interrupted():
                folder.log_validation(step, loss)

    @staticmethod
    def due(step: int, last: int, every: int | str) -> bool:
        """Whether a validation comes after `step`; the one after the last step is the run's own."""
        return isinstance(every, int) and every > 0 and step % every == 0 and step != last

    def catch_up(self, folder: RunFolder, step: int, last: int, every: int | str) -> None:
        """Before a run goes on after `step`: the validation due there, where its line is not written yet."""
        validations, changes = on_first(
            self._process, lambda: [folder.validation.read()[-1:], folder.rank_changes.read()[-1:]]
        )
        due = step in (0, last) or self.due(step, last, every) or _broken_off(changes, step)
        if due and not (validations and validations[0]["step"] >= step):
            self.log(folder, step)


def _broken_off(changes: list[dict[str, Any]], step: int) -> bool:
    """Whether the last rank change came after `step`, and a stop broke off the validation behind it."""
    if not changes or changes[0]["step"] != step:
        return False
    moved = changes[0]["pruned"] or changes[0]["expanded"]
    return bool(moved) and changes[0]["loss_after"] is None
