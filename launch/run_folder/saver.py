"""When a run saves, and how a save goes on beside the training: copied at once, written meanwhile, completed later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.state import Snapshot, take_snapshot
from flexlora_ds.errors import RunError
from launch.distributed.agreement import gather_results, on_rank_zero
from launch.distributed.process import Process
from launch.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from flexlora_ds.controller import RankController


class _Writing:
    """One save in flight on this process."""

    def __init__(self, part: Path, snapshot: Snapshot) -> None:
        self.part = part
        self.step = int(snapshot.state["step"])
        self._entries: list[files.FileEntry] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="save", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> list[dict[str, Any]]:
        """Wait for the end; the manifest's entries of the files written. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [asdict(entry) for entry in self._entries]

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._entries = snapshot.write(self.part)
        except OSError as error:
            error.filename = error.filename or str(self.part)
            self._error = error
        except Exception as error:  # safetensors wraps what the disk says
            self._error = OSError(0, str(error), str(self.part))


class Saver:
    """Saves the training state every `every` steps (0: never by itself) of `last`, one save in flight at a time.

    Every method is collective unless it says otherwise.

    `run`: what goes into the checkpoint beside the state of the engine; `constants`: tensors that never change.
    """

    def __init__(
        self,
        folder: RunFolder,
        process: Process,
        engine: DeepSpeedEngine,
        controller: RankController | None,
        run: Callable[[], dict[str, Any]],
        *,
        constants: Mapping[str, Tensor],
        every: int,
        keep: int,
        last: int,
    ) -> None:
        self._folder = folder
        self._process = process
        self._engine = engine
        self._controller = controller
        self._run = run
        self._constants = constants
        self._every = every
        self._keep = keep
        self._last = last
        self._writing: _Writing | None = None
        self.saved = 0
        """The step of the newest checkpoint that is complete or being written; 0 for none."""

    @property
    def busy(self) -> bool:
        """Whether this process is still writing; not collective."""
        return self._writing is not None and self._writing.busy

    def after_step(self, step: int) -> None:
        """Begin a save where one is due; the last step's comes with the end of the run."""
        if self._every and step % self._every == 0 and step != self._last:
            self.begin(step)

    def begin(self, step: int) -> None:
        """Copy the state after `step` and write it while training goes on; waits for an earlier save first.

        Raises:
            RunError: the disk refuses, on any process, or the run folder is another now.
        """
        self.complete()
        # All write into the folder that process 0 makes.
        part = Path(on_rank_zero(self._process, lambda: self._part(step)))
        snapshot = take_snapshot(
            self._engine, step, controller=self._controller, run=self._run(), constants=self._constants
        )
        self._writing = _Writing(part, snapshot)
        self.saved = step

    def save(self, step: int) -> None:
        """Save the state after `step`, unless it is saved already, and wait until it is complete."""
        if self.saved != step:
            self.begin(step)
        self.complete()

    def complete(self) -> None:
        """Wait for the save in flight, where there is one, and make it a checkpoint.

        Raises:
            RunError: a process could not write; what there is of the save is removed, earlier checkpoints stay.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            # Each process wrote files of its own.
            written = gather_results(self._process, lambda: self._written(writing))
        except Exception:
            files.discard(writing.part)
            raise
        entries = [files.FileEntry(**entry) for share in written for entry in share]
        on_rank_zero(self._process, lambda: self._commit(writing.part, entries))  # one manifest, one rename

    def _part(self, step: int) -> str:
        self._folder.require_present()
        return str(files.begin(self._folder.checkpoints, step))

    def _written(self, writing: _Writing) -> list[dict[str, Any]]:
        try:
            return writing.result()
        finally:
            self._folder.require_present()  # why it could not be written, where this is why

    def _commit(self, part: Path, entries: list[files.FileEntry]) -> None:
        try:
            self._folder.sync()
            files.commit(part, entries)
        except (OSError, RunError):
            files.discard(part)
            raise
        files.keep_newest(self._folder.checkpoints, self._keep)
