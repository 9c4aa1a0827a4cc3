"""The validation loss: the same number on every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm

from launch.data.batches import ValidationBatches
from launch.distributed.agreement import on_rank_zero
from launch.distributed.process import Process
from launch.engine.methods.protocol import Method
from launch.model.token_loss import head_of, token_loss
from launch.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Validator:
    """Computes Σ token losses / target tokens over the records held out, every `every` steps of `last`; collective.

    `every` "auto": before the first step and after the last, and around every rank change; 0: never.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        method: Method,
        batches: ValidationBatches | None,
        process: Process,
        folder: RunFolder,
        interrupted: Callable[[], bool],
        *,
        every: int | str,
        last: int,
    ) -> None:
        self._engine = engine
        self._method = method
        self._batches = batches if every != 0 else None
        self._process = process
        self._device = process.device
        self._folder = folder
        self._interrupted = interrupted
        self._every = every
        self._last = last
        self.last_loss: float | None = None
        """The loss written last in this session."""
        self._head = head_of(engine.module)

    def __bool__(self) -> bool:
        """Whether there is anything to validate on."""
        return self._batches is not None

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss in evaluation mode (no dropout); NaN where the run is asked to stop meanwhile."""
        assert self._batches is not None, "no records are held out"
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._batches:
            if self._interrupted():  # agreed, so that all leave the forward passes after the same one
                total += float("nan")
                break
            self._method.before_forward(batch, self._device)
            total += token_loss(self._engine, batch, self._device, self._head).double()
        self._engine.train()
        comm.all_reduce(total)  # each process has the losses of its own share of the records
        return float(total) / self._batches.target_tokens

    def before_first_step(self, done: int) -> None:
        """Before a run goes on after step `done`: the validation due there, where its line is not written yet."""
        validations, changes = on_rank_zero(  # which has the logs, and whose answer decides for all
            self._process,
            lambda: [self._folder.validation.read()[-1:], self._folder.rank_changes.read()[-1:]],
        )
        due = done in (0, self._last) or self._due(done) or _broken_off(changes, done)
        if due and not (validations and validations[0]["step"] >= done):
            self.log(done)

    def after_step(self, step: int) -> None:
        """Validate where that is due; the validation after the last step is the run's own."""
        if self._due(step):
            self.log(step)

    def log(self, step: int) -> None:
        """Validate and write the line, where records are held out and no stop is asked for."""
        if self:
            loss = self()
            if not self._interrupted():
                self.last_loss = loss
                self._folder.log_validation(step, loss)

    def _due(self, step: int) -> bool:
        every = self._every
        return isinstance(every, int) and every > 0 and step % every == 0 and step != self._last


def _broken_off(changes: list[dict[str, Any]], step: int) -> bool:
    """Whether the last rank change came after `step`, and a stop broke off the validation behind it."""
    if not changes or changes[0]["step"] != step:
        return False
    moved = changes[0]["pruned"] or changes[0]["expanded"]
    return bool(moved) and changes[0]["loss_after"] is None
