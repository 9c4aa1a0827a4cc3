"""A run with its trackers: they live from its first step to its end, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launch.loop.session import Session
from launch.run_folder.resume import Start
from launch.trackers.beside import Trackers

_PATIENCE_SECONDS = 60.0
_HURRY_SECONDS = 10.0
"""Where the run was stopped or failed: who stops it may end it soon."""


@contextmanager
def tracked(run: Session, start: Start) -> Iterator[None]:
    """Start the trackers that the options name, on process 0, and let them write the rest at the end."""
    if not run.options.track or not run.process.is_rank_zero:
        yield
        return
    after = None if start.checkpoint is None else start.step
    run.log.trackers = Trackers(run.options.track, run.folder.path, after, run.log.warn)
    seconds = _HURRY_SECONDS
    try:
        yield
        seconds = _HURRY_SECONDS if run.stop.reached else _PATIENCE_SECONDS
    finally:
        run.log.trackers.close(seconds)
