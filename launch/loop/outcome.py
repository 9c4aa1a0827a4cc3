"""Whether a run that came to its last step has trained anything: its numbers must be finite."""

from __future__ import annotations

import math

import torch

from flexlora_ds.errors import RunError
from launch.distributed.agreement import largest
from launch.loop.session import Session
from launch.model.token_loss import head_of, token_loss

_REMEDY = "lower lr, or use bf16 or fp32; an earlier checkpoint can be exported with --checkpoint"


def require_success(run: Session) -> None:
    """Judge a run after its last step, before anything of its end is written; collective.

    Raises:
        RunError: all of its updates were skipped, its last loss is not finite, or that after its last update is not;
            on all processes alike.
    """
    if run.done and run.guard.skipped >= run.done:
        raise RunError("every update was skipped, so nothing was learnt", f"{run.done} steps", _REMEDY)
    # Also None, as a checkpoint keeps a loss that is not finite.
    if run.done and not _is_finite(run.log.last_loss):
        raise RunError("the last loss is not finite", f"step {run.done}", _REMEDY)
    if not _finite_after_last_update(run):
        raise RunError("the loss after the last update is not finite", f"step {run.done}", _REMEDY)


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _finite_after_last_update(run: Session) -> bool:
    """By the last validation, or by the last micro-batch of each process where nothing is held out."""
    if run.validator.last_loss is not None:
        return _is_finite(run.validator.last_loss)
    if run.validator or run.guard.last is None:
        return True
    # The largest of one flag: each process looks at a micro-batch of its own.
    return not largest(run.process, [not _loss_is_finite(run)])[0]


@torch.no_grad()
def _loss_is_finite(run: Session) -> bool:
    batch, device = run.guard.last, run.process.device
    assert batch is not None
    run.engine.eval()
    run.method.before_forward(batch, device)
    loss = token_loss(run.engine, batch, device, head_of(run.engine.module))
    run.engine.train()
    return bool(torch.isfinite(loss))
