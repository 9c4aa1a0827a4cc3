"""Trackio: a database on this machine (`TRACKIO_DIR`), or the Space that `TRACKIO_SPACE_ID` names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import trackio

from launch.trackers.protocol import PROJECT, TrackedRun


class Trackio:
    """One run of trackio's, continued by its name."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        # Runs of one project are told apart by their names alone.
        self.id = run.id or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config={key: value for key, value in run.options.items() if not key.startswith("_")},
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, png: Path) -> None:
        """The picture, copied by trackio."""
        self._run.log({name: trackio.Image(str(png))}, step=step)

    def finish(self, *, finished: bool) -> None:
        """Write the rest."""
        self._run.finish()


def start(run: TrackedRun) -> Trackio:
    """Begin or continue the run."""
    return Trackio(run)
