"""The guard against numbers that are not finite: it names where they came from and ends a run that has too many.

That the update is skipped on all processes alike is the engine's part: a loss that is not finite poisons its own
gradient here, and the engine checks the reduced gradients. So the guard needs no communication while all is well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_ds.errors import RunError
from flexlora_ds.partitions import GradientProbe, loss_scale, skip_non_finite
from launch.data.batches import MicroBatch
from launch.distributed.agreement import gather
from launch.distributed.process import Process

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LIMIT = 3
"""This many skipped updates in a row end the run."""


class FiniteGuard:
    """Watches the losses and gradients of this process; every process has one."""

    def __init__(self, engine: DeepSpeedEngine, process: Process, say: Callable[[str], None]) -> None:
        self._engine = engine
        self._process = process
        self._say = say
        self._probe = GradientProbe(engine.module.parameters())
        self._seen: list[tuple[MicroBatch, Tensor, Tensor | None]] = []
        self._skipped = int(engine.skipped_steps)
        self.in_a_row = 0
        self.last: MicroBatch | None = None
        """The micro-batch that this process looked at last."""
        skip_non_finite(engine)

    @property
    def skipped(self) -> int:
        """How many updates of the run were skipped so far."""
        return self._skipped

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint; JSON."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict()`, after the engine's counts."""
        self.in_a_row = int(state["in_a_row"])
        self._skipped = int(self._engine.skipped_steps)

    def checked(self, loss: Tensor, batch: MicroBatch) -> Tensor:
        """The loss; one that is not finite gives gradients of NaN (an infinite loss alone may have finite ones)."""
        self._close_last()
        self.last = batch
        finite = torch.isfinite(loss.detach())
        self._seen.append((batch, finite, None))
        return loss * torch.where(finite, 1.0, float("nan"))

    def after_step(self, step: int) -> bool:
        """Whether the update of `step` was skipped, the same on every process.

        Raises:
            RunError: the third update in a row was skipped for numbers that are not finite.
        """
        self._close_last()
        seen, self._seen = self._seen, []
        skipped = int(self._engine.skipped_steps) > self._skipped
        self._skipped = int(self._engine.skipped_steps)
        if not skipped:
            self.in_a_row = 0
            return False
        self._explain(step, seen)
        return True

    def forget_gradients(self) -> None:
        """Leave out what the gradients of a micro-batch that is no part of a step have added."""
        self._probe.take()

    def _close_last(self) -> None:
        """Give the last micro-batch the sum of its gradients."""
        if self._seen and self._seen[-1][2] is None:
            batch, finite, _ = self._seen[-1]
            self._seen[-1] = (batch, finite, self._probe.take())

    def _explain(self, step: int, seen: list[tuple[MicroBatch, Tensor, Tensor | None]]) -> None:
        losses = [id for batch, finite, _ in seen if not bool(finite) for id in batch.record_ids]
        gradients = [
            id
            for batch, _, total in seen
            if total is not None and not bool(torch.isfinite(total))
            for id in batch.record_ids
        ]
        # Each process knows of its own micro-batches only, and process 0 says it.
        answers = gather(self._process, {"losses": losses, "gradients": gradients})
        if self._by_loss_scale(answers):
            scale = loss_scale(self._engine)
            self._say(f"step {step}: the gradient overflowed fp16; update skipped, loss scale now {scale:g}")
            return
        self.in_a_row += 1
        found = [
            _sentence(rank, answer)
            for rank, answer in enumerate(answers)
            if answer["losses"] or answer["gradients"]
        ]
        where = "; ".join(found) or "in the sum of all processes' gradients"
        text = f"step {step}: not finite {where}"
        self._say(f"{text}; update skipped on all processes ({self.in_a_row} in a row)")
        if self.in_a_row >= LIMIT:
            raise RunError(
                f"{LIMIT} updates in a row were not finite",
                text,
                "look at these records, lower lr, or use bf16 or fp32",
            )

    def _by_loss_scale(self, answers: list[Any]) -> bool:
        """Whether only fp16's scaled gradients overflowed, which a smaller scale avoids."""
        dynamic = bool(getattr(self._engine, "dynamic_loss_scale", lambda: False)())
        return dynamic and self._engine.fp16_enabled() and not any(a["losses"] for a in answers)


def _sentence(rank: int, answer: dict[str, list[int]]) -> str:
    kind, ids = ("loss", answer["losses"]) if answer["losses"] else ("gradient", answer["gradients"])
    shown = ", ".join(str(id + 1) for id in ids[:16]) + (", …" if len(ids) > 16 else "")
    return f"in the {kind} of process {rank} (records {shown})"
