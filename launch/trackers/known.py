"""The trackers by name, and what each needs. Importing this imports none of their libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import import_module
from typing import get_args

from flexlora_ds.errors import UserError
from launch.options.train_options import TrackerName
from launch.trackers.protocol import TrackedRun, Tracker


def require_installed(names: Sequence[str], place: str) -> None:
    """See that the library of each tracker is there.

    Raises:
        UserError: it is not; the message has the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name} is not installed", place, f"pip install {name}, or leave it out of track"
            )


def open_tracker(name: str, run: TrackedRun) -> Tracker:
    """The tracker of a name, begun or continued; what its library raises is not ours."""
    assert name in get_args(TrackerName), name
    tracker: Tracker = import_module(f"launch.trackers.to_{name}").start(run)
    return tracker
