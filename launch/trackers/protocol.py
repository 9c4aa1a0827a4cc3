"""What a tracker is told of a run, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "flexlora"
"""The project, or experiment, that a run belongs to where the tracker's own environment variable names none."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker begins with it."""

    name: str
    options: Mapping[str, Any]
    """Those of options.yaml."""
    folder: Path
    """Where the tracker may keep files: `tracking/` of the run folder."""
    id: str | None
    """What `Tracker.id` was when the run was tracked before; None the first time."""
    taken_back: int | None
    """The run goes on after this step: what was told of later ones counts no more. None: nothing was taken back."""


class Tracker(Protocol):
    """A dashboard's writer; one file each, whose function `start(run)` begins or continues the dashboard's run."""

    id: str
    """By which the dashboard knows the run."""
    takes_back: bool
    """Whether steps that a crash undid can be told again; else each is told once."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; none of them is NaN."""
        ...

    def image(self, step: int, name: str, png: Path) -> None:
        """A picture; its file may change afterwards."""
        ...

    def finish(self, *, finished: bool) -> None:
        """The run came to its last step, or was stopped, or failed; blocks until everything is written."""
        ...
