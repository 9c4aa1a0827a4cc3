"""Whether a run stops before its last step: the processes agree on it."""

from __future__ import annotations

from launch.distributed.agreement import largest, on_rank_zero
from launch.distributed.process import Process
from launch.distributed.signals import SignalWatcher
from launch.run_folder.folder import RunFolder
from launch.run_folder.saver import Saver


class StopAgreement:
    """Asked before every step, and wherever something takes long: a stop on one process is a stop on all."""

    def __init__(self, process: Process, watcher: SignalWatcher, folder: RunFolder) -> None:
        self._process = process
        self._watcher = watcher
        self._folder = folder
        self.reached = False

    def before_step(self, saver: Saver) -> bool:
        """Whether the run stops here; completes a background save that all processes have written. Collective.

        Raises:
            RunError: a log or a save could not be written; on all processes alike.
        """
        faulty = self._folder.fault is not None
        # A signal, a slow disk or a full one meets one process, and concerns all: one small message a step.
        stop, busy, fault = largest(self._process, [self._watcher.stop, saver.busy, faulty])
        if fault:
            # Process 0 writes the logs, so it knows why.
            on_rank_zero(self._process, self._folder.raise_fault)
        self.reached = self.reached or bool(stop)
        if not busy:
            saver.complete()
        return self.reached

    def interrupted(self) -> bool:
        """Whether a stop is agreed by now; collective, for loops inside a step."""
        self.reached = self.reached or bool(largest(self._process, [self._watcher.stop])[0])
        return self.reached
