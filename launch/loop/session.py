"""The parts of a run that live from its first step to its last, and how they are put back to where a run stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexlora_ds.base_model.fingerprint import base_fingerprint, base_revision
from flexlora_ds.checkpoint.adapter import NOTES, adapter_notes
from launch.data.examples import TokenisedData
from launch.data.prepare import Data, steps_of
from launch.distributed.agreement import on_first
from launch.distributed.process import Process
from launch.distributed.signals import Watch
from launch.engine.build import build_engine
from launch.engine.methods import Method
from launch.loop.finite_guard import Guard
from launch.loop.run_log import Journal
from launch.loop.stopping import Control
from launch.loop.validation import Validator
from launch.options.train_options import TrainOptions
from launch.progress import Progress
from launch.run_folder.compatibility import Base, Identity
from launch.run_folder.folder import RunFolder, library_versions
from launch.run_folder.lock import locked
from launch.run_folder.resume import Start
from launch.run_folder.saver import Saver


@dataclass(frozen=True)
class Session:
    """One run in one process."""

    options: TrainOptions
    process: Process
    folder: RunFolder
    engine: Any
    method: Method
    batches: Data
    journal: Journal
    validator: Validator
    guard: Guard
    control: Control
    saver: Saver

    def resume(self, start: Start) -> None:
        """Put everything back to where the checkpoint was taken; nothing to do without one.

        Raises:
            RunError: the checkpoint does not fit the engine; nothing has been changed then.
        """
        if start.checkpoint is None:
            self.journal.initial_parameters = self.method.trainable_parameters
            return
        start.checkpoint.restore(self.engine, controller=self.method.controller)
        self.journal.load_state_dict(start.checkpoint.run["journal"])
        self.guard.load_state_dict(start.checkpoint.run["guard"])
        if start.checkpoint.folder.parent.resolve() == self.folder.checkpoints.resolve():
            self.saver.saved = start.step


@contextmanager
def run_folder(options: TrainOptions, process: Process) -> Iterator[RunFolder]:
    """The run folder, checked and locked by process 0 while the run lives; collective.

    Raises:
        UserError: it cannot be written, or `resume none` finds it in use. RunError: another run holds it.
    """
    folder = RunFolder(options.out, writes=process.first)
    on_first(process, lambda: folder.prepare(options.resume))
    lock = locked(folder.path)
    on_first(process, lock.__enter__)
    try:
        yield folder
    finally:
        if process.first:
            lock.__exit__(None, None, None)


def identify(options: TrainOptions, data: TokenisedData, process: Process) -> Identity:
    """What this run is a run of; process 0 looks at the model's files."""
    steps = steps_of(options, data)
    model = options.model
    fingerprint, revision = on_first(process, lambda: [base_fingerprint(model), base_revision(model)])
    base = Base(model, revision, fingerprint)
    return Identity.of(options, base, data.train.digest(), steps)


def begin(
    options: TrainOptions,
    ds_config: Mapping[str, Any],
    folder: RunFolder,
    process: Process,
    batches: Data,
    identity: Identity,
    start: Start,
    watch: Watch,
) -> Session:
    """Build the engine and all that lives around it, at the place where the run begins; collective.

    Raises:
        UserError: as `launch.engine.build.build_engine`. RunError: the checkpoint does not fit.
    """
    engine, method = build_engine(options, ds_config, batches.steps, process, start.ranks)
    progress = Progress(batches.steps, log_every=options.log_every, start=start.step, shows=process.first)
    journal = Journal(options, folder, batches.train, progress, process.device)
    control = Control(process, watch, folder, start.step)
    held_out = batches.validation if options.val_every != 0 else None
    validator = Validator(engine, method, held_out, process, control.interrupted)
    method.attach(engine, batches.steps, validator or None)
    guard = Guard(engine, process, journal.warn)

    def notes() -> dict[str, Any]:
        """What a checkpoint says beside the engine's state."""
        return {
            "identity": identity.to_dict(),
            "origin": start.origin,
            "journal": journal.state_dict(),
            "guard": guard.state_dict(),
            "versions": library_versions(),
            NOTES: None
            if controller is None
            else adapter_notes(controller.config, options.model, options.prompt),
        }

    controller, every, keep = method.controller, options.save_every, options.keep_checkpoints
    saver = Saver(folder, process, engine, controller, notes, every=every, keep=keep)
    session = Session(
        options, process, folder, engine, method, batches, journal, validator, guard, control, saver
    )
    session.resume(start)
    return session
