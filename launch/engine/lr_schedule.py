"""The learning-rate factor: warm-up, then linear, cosine or constant, counted in applied updates."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from flexlora_ds.terminal.counted import counted
from launch.options.train_options import LrSchedule, TrainOptions

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


def factor(
    step: int, total: int, warmup: int, *, schedule: LrSchedule = "linear", min_ratio: float = 0.0
) -> float:
    """The part of the peak learning rate that the next update uses.

    The warm-up rises in `warmup` equal parts and the update after it is the first at the peak, from where
    `linear` and `cosine` reach `min_ratio` when `total` updates are done. No update has the factor 0 unless
    `min_ratio` and the run's end give it, so none is wasted.

    Args:
        step: updates applied so far (skipped ones do not count), from 0.
        total: updates in the whole run.
        warmup: updates of the warm-up; 0 for none.
        min_ratio: the factor at the end, in [0, 1]; `constant` takes no notice of it.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_ratio + (1 - min_ratio) * falling


def peak_doubt(options: TrainOptions, total_steps: int) -> str | None:
    """A warning where the warm-up is as long as the run, so that no update has the learning rate that was asked for."""
    if options.warmup_steps < total_steps:
        return None
    reached = options.lr * factor(total_steps - 1, total_steps, options.warmup_steps)
    return (
        f"warmup_steps {options.warmup_steps:,} is not below the run's {counted(total_steps, 'step')}: "
        f"lr rises to {reached:.2g}, not to {options.lr:g}; lower it"
    )


def build_lr_scheduler(optimizer: Optimizer, options: TrainOptions, total_steps: int) -> LambdaLR:
    """The schedule for all parameter groups; each group's own `lr` is its peak.

    Given to `deepspeed.initialize`, the engine advances it once per applied update and not on skipped ones.
    """
    from torch.optim.lr_scheduler import LambdaLR

    curve = functools.partial(
        factor,
        total=total_steps,
        warmup=options.warmup_steps,
        schedule=options.lr_schedule,
        min_ratio=options.min_lr_ratio,
    )
    return LambdaLR(optimizer, curve)
