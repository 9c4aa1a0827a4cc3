"""Weights & Biases: `WANDB_PROJECT`, `WANDB_ENTITY` and `WANDB_MODE` (online, offline) are the library's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import wandb

from launch.trackers.protocol import PROJECT, TrackedRun


class WeightsAndBiases:
    """One run of wandb's, continued by its id."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.id,
            resume="allow" if run.id else None,
            dir=str(run.folder),
            config=dict(run.options),
            settings=wandb.Settings(console="off"),
        )
        self.id: str = self._run.id
        # Its own count of steps refuses what comes late; the run's steps are an axis of their own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, png: Path) -> None:
        """The picture, copied by wandb."""
        self._run.log({"step": step, name: wandb.Image(str(png))})

    def finish(self, *, finished: bool) -> None:
        """Upload the rest; a run that did not finish is shown as failed until it goes on."""
        self._run.finish(exit_code=0 if finished else 1)


def start(run: TrackedRun) -> WeightsAndBiases:
    """Begin or continue the run."""
    return WeightsAndBiases(run)
