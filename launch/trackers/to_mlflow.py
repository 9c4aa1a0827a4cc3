"""MLflow: `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` are the library's own; by default a local database."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import mlflow

from launch.trackers.protocol import PROJECT, TrackedRun

_LONGEST = 500
"""Characters of an option's value that every version of MLflow keeps."""


class MLflow:
    """One run of MLflow's, continued by its id."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        begun = mlflow.start_run(run_id=run.id, run_name=None if run.id else run.name)
        self.id: str = begun.info.run_id
        if run.id is None:  # a parameter may be said once
            mlflow.log_params({key: str(value)[:_LONGEST] for key, value in run.options.items()})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One value of each metric."""
        mlflow.log_metrics(dict(values), step=step)

    def image(self, step: int, name: str, png: Path) -> None:
        """An artifact named after the step."""
        mlflow.log_image(mlflow.Image(str(png)), artifact_file=f"{name}/step-{step:08d}.png")

    def finish(self, *, finished: bool) -> None:
        """End the run, as finished or as killed."""
        mlflow.end_run("FINISHED" if finished else "KILLED")


def start(run: TrackedRun) -> MLflow:
    """Begin or continue the run."""
    return MLflow(run)
