"""The steps of a run, until the last one or until the processes agree to stop."""

from __future__ import annotations

from collections.abc import Iterator

from launch.distributed.agreement import largest, on_first
from launch.distributed.process import Process
from launch.distributed.signals import Watch
from launch.run_folder.folder import RunFolder
from launch.run_folder.saver import Saver


class Control:
    """Asks, before every step and wherever something takes long, whether any process was told to stop."""

    def __init__(self, process: Process, watch: Watch, folder: RunFolder, start: int) -> None:
        self._process = process
        self._folder = folder
        self._watch = watch
        self.done = start
        """The last step that was completed."""
        self.stopping = False

    def steps(self, total: int, saver: Saver) -> Iterator[int]:
        """The steps still to do; ends early when a stop is agreed. Completes background saves between them.

        Raises:
            RunError: a log or a save could not be written; on all processes alike.
        """
        while True:
            faulty = self._folder.fault is not None
            stop, busy, fault = largest(self._process, [self._watch.stop, saver.busy, faulty])
            if fault:
                on_first(self._process, self._folder.raise_fault)
            self.stopping = self.stopping or bool(stop)
            saver.settle(bool(busy))
            if self.stopping or self.done >= total:
                return
            yield self.done + 1
            self.done += 1

    def interrupted(self) -> bool:
        """Whether a stop is agreed by now; collective, for loops inside a step."""
        self.stopping = self.stopping or bool(largest(self._process, [self._watch.stop])[0])
        return self.stopping
