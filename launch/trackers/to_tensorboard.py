"""TensorBoard: event files in `tracking/tensorboard`, by tensorboard's own writer, which needs no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launch.trackers.protocol import TrackedRun


class TensorBoard:
    """One event file for each start of the run, all in one folder."""

    takes_back = True

    def __init__(self, run: TrackedRun) -> None:
        self.id = "tensorboard"
        self._writer = EventFileWriter(str(run.folder / self.id))
        if run.taken_back is not None:
            # TensorBoard drops what earlier files hold from this step on (`purge_step` of torch's writer).
            start = SessionLog(status=SessionLog.START)
            self._write(run.taken_back + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event for all numbers of a step."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=found))

    def image(self, step: int, name: str, png: Path) -> None:
        """The picture as it is."""
        picture = Summary.Image(encoded_image_string=png.read_bytes())
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()

    def finish(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


def start(run: TrackedRun) -> TensorBoard:
    """Begin an event file."""
    return TensorBoard(run)
