"""A run folder written row by row, as a run writes it: two matrices, a rank change every fifth step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.options.train_options import TrainOptions
from launch.run_folder.folder import RunFolder, StepMetrics, Summary

MATRICES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def begin_run(path: Path) -> RunFolder:
    """An empty run folder with its options."""
    path.mkdir()
    folder = RunFolder(path)
    folder.write_options(TrainOptions(model="m").to_yaml())
    folder.log_validation(0, 3.5)
    return folder


def write_steps(folder: RunFolder, first: int, last: int, shift: float = 0.0) -> None:
    """The rows of some steps: a rank change before the row of its step, a validation after it."""
    for step in range(first, last + 1):
        if step % 5 == 0:
            folder.log_rank_change(change(step))
        folder.log_step(metrics(step, shift))
        if step % 5 == 0:
            folder.log_validation(step, 3.0 + shift - step / 100)


def end_run(folder: RunFolder, steps: int) -> None:
    """The summary of a finished run."""
    folder.write_summary(
        Summary(
            state="finished",
            steps=steps,
            final_loss=1.0,
            wall_seconds=1.0,
            tokens=steps,
            tokens_per_s=1.0,
            peak_mem_gb=0.1,
            trainable_params_final=10,
            trainable_params_mean=10.0,
            rank_changes=steps // 5,
        )
    )


def metrics(step: int, shift: float = 0.0) -> StepMetrics:
    """A step's row; the fourth has a gradient norm that was not finite."""
    return StepMetrics(
        step=step,
        epoch=step / 10,
        loss=2.0 + shift - step / 100,
        orth=0.01,
        lr=1e-3 * step,
        grad_norm=float("nan") if step == 4 else 0.5,
        tokens=100 * step,
        tokens_per_s=50.0,
        step_s=2.0,
        peak_mem_gb=0.25,
        total_rank=8,
    )


def change(step: int) -> dict[str, Any]:
    """One direction from the second matrix to the first, and back at the next change."""
    gains, loses = MATRICES if step % 10 else MATRICES[::-1]
    return {
        "step": step,
        "adjust_size": 1,
        "importance": {gains: 1.5, loses: 0.5},
        "score_margin": 1.0,
        "pruned": [loses],
        "expanded": [gains],
        "prune_age": [step],
        "ranks": {gains: 5, loses: 3} if step % 10 else dict.fromkeys(MATRICES, 4),
        "total_rank": 8,
        "trainable_params": 1000 + step,
        "loss_before": None,
        "loss_after": None,
        "spectrum_error": 0.0,
        "seconds": 0.1,
    }
