"""The parts of a run that live from its first step to its last, and how they are put back to where a run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.live import LiveTest
from flexlora_ds.adapter.layer import any_transposed
from flexlora_ds.base_model.fingerprint import base_fingerprint, base_revision
from flexlora_ds.checkpoint.adapter import NOTES, adapter_notes
from launch.data.batches import GlobalBatch
from launch.data.examples import TokenisedData
from launch.data.prefetch import training_feed
from launch.data.prepare import Data, steps_of
from launch.distributed.agreement import on_rank_zero
from launch.distributed.process import Process, limit_collectives
from launch.distributed.signals import SignalWatcher
from launch.engine.adapter_start import identify_adapter, share_start
from launch.engine.build import build_engine
from launch.engine.first_batches import FirstBatches
from launch.engine.methods.protocol import Beginning, Method
from launch.engine.settled import Settled
from launch.loop.accuracy import AccuracyLog
from launch.loop.finite_guard import FiniteGuard
from launch.loop.run_log import RunLog
from launch.loop.stopping import StopAgreement
from launch.loop.validation import Validator
from launch.options.parameter_match import ParameterMatch
from launch.options.train_options import TrainOptions
from launch.progress import Progress
from launch.run_folder.compatibility import Base, Identity
from launch.run_folder.folder import RunFolder, library_versions
from launch.run_folder.lock import one_run_in
from launch.run_folder.resume import LOG_SEALS, Start
from launch.run_folder.saver import Saver

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


METHOD = "method"
"""Under this name a checkpoint keeps what `Method.state_dict` gives."""


@dataclass
class Session:
    """One run in one process."""

    options: TrainOptions
    process: Process
    folder: RunFolder
    engine: DeepSpeedEngine
    method: Method
    data: Data
    log: RunLog
    validator: Validator
    accuracy: AccuracyLog
    guard: FiniteGuard
    stop: StopAgreement
    saver: Saver
    match: ParameterMatch | None = None
    """What `match_params` came to."""
    done: int = 0
    """The last step that was completed."""

    def batches(self, *, after: int) -> Iterator[GlobalBatch]:
        """The batches of the steps after `after`, to the last or until the processes agree to stop; collective.

        Raises:
            RunError: a log or a save could not be written; on all processes alike.
        """
        self.done = after
        with training_feed(self.data.train, after, self.data.steps, self.process.device) as feed:
            while not self.stop.before_step(self.saver) and self.done < self.data.steps:
                yield next(feed)
                if self.done == after:
                    # The first step may have compiled; from now on all processes are equally fast.
                    limit_collectives(self.options.timeout)
                self.done += 1
        limit_collectives(None)

    def resume(self, start: Start) -> None:
        """Put everything back to where the checkpoint was taken; nothing to do without one.

        Raises:
            RunError: the checkpoint does not fit the engine; nothing has been changed then.
        """
        if start.checkpoint is None:
            self.log.initial_parameters = self.method.trainable_parameters
            return
        start.checkpoint.restore(self.engine, controller=self.method.controller)
        if start.checkpoint.run.get(METHOD):
            self.method.load_state_dict(start.checkpoint.run[METHOD], start.step)
        self.log.load_state_dict(start.checkpoint.run["journal"])
        self.guard.load_state_dict(start.checkpoint.run["guard"])
        if start.checkpoint.folder.parent.resolve() == self.folder.checkpoints.resolve():
            self.saver.saved = start.step


@contextmanager
def run_folder(options: TrainOptions, process: Process) -> Iterator[RunFolder]:
    """The run folder, checked and locked by process 0 while the run lives; collective.

    Raises:
        UserError: it cannot be written, or `resume none` finds it in use. RunError: another run holds it.
    """
    folder = RunFolder(options.out, is_rank_zero=process.is_rank_zero)
    on_rank_zero(process, lambda: folder.prepare(options.resume))
    with ExitStack() as held:

        def hold() -> None:
            folder.require_present = held.enter_context(one_run_in(folder.path))

        on_rank_zero(process, hold)
        yield folder


def identify(options: TrainOptions, data: TokenisedData, process: Process) -> Identity:
    """What this run is a run of; process 0 looks at the model's files."""
    steps = steps_of(options, data)
    model = options.model
    fingerprint, revision, adapter = on_rank_zero(
        process, lambda: [base_fingerprint(model), base_revision(model), identify_adapter(options)]
    )
    base = Base(model, revision, fingerprint)
    return Identity.of(options, base, data.train.digest(), steps, adapter)


def begin(
    settled: Settled,
    folder: RunFolder,
    process: Process,
    batches: Data,
    identity: Identity,
    start: Start,
    watcher: SignalWatcher,
    test: LiveTest | None = None,
) -> Session:
    """Build the engine and all that lives around it, at the place where the run begins; collective.

    Raises:
        UserError: as `launch.engine.build.build_engine`. RunError: the checkpoint does not fit.
    """
    options, steps = settled.options, batches.steps
    adapter = None if start.checkpoint else share_start(options, settled.skeleton.shapes, process)
    beginning = Beginning(FirstBatches.of(options, batches, process.device), start.constants, adapter)
    engine, method = build_engine(settled, steps, process, start.ranks, beginning)
    progress = Progress(steps, log_every=options.log_every, start=start.step, shows=process.is_rank_zero)
    log = RunLog(folder, engine, method, progress, process.device, every=options.log_every, last=steps)
    stop = StopAgreement(process, watcher, folder)
    held_out, val_every = batches.validation, options.val_every
    validator = Validator(
        engine, method, held_out, process, folder, stop.interrupted, every=val_every, last=steps
    )
    method.attach(engine, steps, validator or None)
    accuracy = AccuracyLog(
        engine,
        process,
        folder,
        test,
        stop.interrupted,
        log.warn,
        every=options.eval_every,
        last=steps,
        most_tokens=settled.layout.micro_batch_size * options.cutoff_len,
    )
    guard = FiniteGuard(engine, process, log.warn)
    saver = Saver(
        folder,
        process,
        engine,
        method.controller,
        _notes(identity, start, options, method, log, guard, folder),
        constants=method.constants,
        every=options.save_every,
        keep=options.keep_checkpoints,
        last=steps,
    )
    session = Session(
        options,
        process,
        folder,
        engine,
        method,
        batches,
        log,
        validator,
        accuracy,
        guard,
        stop,
        saver,
        settled.match,
    )
    session.resume(start)
    return session


def _notes(
    identity: Identity,
    start: Start,
    options: TrainOptions,
    method: Method,
    log: RunLog,
    guard: FiniteGuard,
    folder: RunFolder,
) -> Callable[[], dict[str, Any]]:
    """What a checkpoint says beside the engine's state, at the time of the call."""
    controller = method.controller
    fixed = {
        "identity": identity.to_dict(),
        "origin": start.origin,
        "versions": library_versions(),
        NOTES: controller
        and adapter_notes(
            controller.config,
            options.model,
            options.prompt,
            prompt_date=options.prompt_date,
            fan_in_fan_out=any_transposed(controller.layers),
        ),
    }
    return lambda: {
        **fixed,
        METHOD: method.state_dict(),
        "journal": log.state_dict(),
        "guard": guard.state_dict(),
        LOG_SEALS: folder.seals(),
    }
