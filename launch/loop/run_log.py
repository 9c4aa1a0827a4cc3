"""What a run says of its steps: the metrics file, the rank changes, the progress line, the warnings."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm

from flexlora_ds.rank_changes.record import Market, RankChange
from launch.data.batches import GlobalBatch
from launch.engine.methods.protocol import Method
from launch.progress import Progress
from launch.run_folder.folder import RunFolder, StepMetrics
from launch.trackers.beside import Trackers

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process held so far, in 10^9 bytes: the GPU's allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class RunLog:
    """Counts the steps of a run and logs them every `every`; every process has one, that of process 0 writes."""

    folder: RunFolder
    engine: DeepSpeedEngine
    method: Method
    progress: Progress
    device: torch.device
    every: int
    last: int
    """The run's last step, which is logged in any case."""
    tokens: int = 0
    warnings: list[str] = field(default_factory=list)
    last_loss: float | None = None
    initial_parameters: int = 0
    trackers: Trackers | None = None
    """They read what is written here; None where there are none."""
    started: float = field(default_factory=time.perf_counter)
    _since: float = field(default_factory=time.perf_counter)
    _lr: float = 0.0
    _norm: torch.Tensor | None = None
    _tokens_since: int = 0
    _steps_since: int = 0

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken, earlier sessions included."""
        return time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; JSON."""
        return {
            "tokens": self.tokens,
            "warnings": list(self.warnings),
            "last_loss": finite_or_none(self.last_loss),
            "initial_parameters": self.initial_parameters,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.tokens = int(state["tokens"])
        self.warnings = [str(text) for text in state["warnings"]]
        self.last_loss = state["last_loss"]
        self.initial_parameters = int(state["initial_parameters"])
        self.started = time.perf_counter() - float(state["wall_seconds"])

    def before_update(self) -> None:
        """Between backward and step: note what the step takes away.

        The learning rate that it uses, and the gradients' norm where the engine keeps none (stage 0 in fp32).
        """
        engine = self.engine
        self._lr = float(engine.basic_optimizer.param_groups[0]["lr"])
        if engine.optimizer is engine.basic_optimizer and engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def step(
        self, batch: GlobalBatch, loss_sum: torch.Tensor, skipped: bool, change: RankChange | None
    ) -> None:
        """Count a step, and log it where that is due: the first, the last, each `every`-th, and one skipped.

        Collective where it is due, and that is the same on all processes.
        """
        self.count(batch)
        if change is not None:
            self._rank_change(change)
        if skipped or batch.step in (1, self.last) or batch.step % self.every == 0:
            self._log(batch, loss_sum, skipped)

    def count(self, batch: GlobalBatch) -> None:
        """Count a step's tokens, without padding."""
        self.tokens += batch.tokens
        self._tokens_since += batch.tokens
        self._steps_since += 1

    def warn(self, text: str) -> None:
        """Say a warning now and again in the summary."""
        if text not in self.warnings:  # a run that goes on says some again
            self.warnings.append(text)
        self.progress.message(f"warning: {text}")

    def _log(self, batch: GlobalBatch, loss_sum: torch.Tensor, skipped: bool) -> None:
        comm.all_reduce(loss_sum)  # each process has the losses of its own micro-batches
        loss = float(loss_sum) / batch.target_tokens
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        norm = self.engine.get_global_grad_norm()
        norm = self._norm if norm is None else norm
        metrics = StepMetrics(
            step=batch.step,
            epoch=batch.epoch,
            loss=loss,
            orth=self.method.orthogonality(),  # gathers the masters: each process holds a part of them
            lr=self._lr,
            grad_norm=None if norm is None else float(norm),
            tokens=self.tokens,
            tokens_per_s=self._tokens_since / seconds,
            step_s=seconds / self._steps_since,
            peak_mem_gb=peak_memory_gb(self.device),
            total_rank=self.method.total_rank,
            skipped=skipped,
        )
        self._tokens_since = self._steps_since = 0
        self.last_loss = loss
        self.folder.log_step(metrics)
        if self.trackers is not None:
            self.trackers.look()
        self.progress.update(batch.step, loss=loss, tokens_per_s=metrics.tokens_per_s, lr=self._lr)

    def _rank_change(self, change: RankChange) -> None:
        """Write a rank change, and say its warnings."""
        self.folder.log_rank_change(change.to_dict())
        self.progress.rank_change(change.step, len(change.pruned), len(change.expanded))
        if change.market is not None and not change.expanded and not change.pruned:
            self.progress.message(f"step {change.step}: {_why_nothing(change.market)}")
        if change.loss_after is not None and math.isfinite(change.loss_after):
            self.folder.log_validation(change.step, change.loss_after)
        for text in change.warnings:
            self.warn(f"step {change.step}: {text}")


def _why_nothing(market: Market) -> str:
    """Why the market traded nothing, in one line."""
    best = max(market.gain.values(), default=0.0)
    if best <= 0:
        return "nothing traded: no gradient outside of the directions stands out of its noise"
    cheapest = min(market.loss.values(), default=math.inf)
    if best <= cheapest:
        return f"nothing traded: a direction gains at least {best:.2g}, the cheapest old one may cost {cheapest:.2g}"
    return f"nothing traded: none gains more (at least {best:.2g}) than those may cost that would pay for it"
