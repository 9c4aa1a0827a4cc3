"""Train an adapter on a base model with DeepSpeed: a run from top to bottom.

    deepspeed launch/train.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]

`--help` lists every key. torchrun and plain python start it as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a launcher puts this folder on the path; the packages are beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from torch import Tensor

    from launch.data.batches import MicroBatch
    from launch.distributed.signals import Watch
    from launch.loop.session import Session
    from launch.run_folder.resume import Start

from launch.command import debug_wanted, guarded, quiet_libraries
from launch.options.train_options import DEFAULT_RECIPE, TrainOptions, parse_options


def train(options: TrainOptions, watch: Watch) -> None:
    """The whole run; `watch` is told of signals and of processes that end.

    Raises:
        UserError, DataError: what the user must change. RunError: what failed.
    """
    from launch.data.prepare import cut_batches, load_tokenizer_of, prepare_data
    from launch.distributed.agreement import alike
    from launch.distributed.process import join_processes, world_size_of_environment
    from launch.loop.finish import finish, stop
    from launch.loop.session import begin, identify, run_folder
    from launch.planning.settle import settle
    from launch.run_folder.resume import continue_files, find_start

    settled = settle(options, world_size_of_environment())
    options, layout = settled.options, settled.layout
    tokenizer = load_tokenizer_of(options)
    process = join_processes()
    watch.follow(process)
    data = alike(process, lambda: prepare_data(options, tokenizer))
    with run_folder(options, process) as folder:
        identity = identify(options, data, process)
        start = find_start(options, folder, process, identity)
        watch.say_ready(process)
        batches = cut_batches(options, data, layout, process, tokenizer.pad_token_id)
        session = begin(options, settled.ds_config, folder, process, batches, identity, start, watch)
        continue_files(start, folder, process)
        folder.write_options(settled.repeatable.to_yaml())
        introduce(session, start)
        run_steps(session, start.step)
        if session.control.stopping:
            stop(session, watch.reason)
        else:
            finish(session)
        watch.part(process)


def run_steps(session: Session, done: int) -> None:
    """The steps after `done`, to the last one or until the processes agree to stop; then the last validation."""
    from launch.data.prefetch import training_feed

    options, method, journal = session.options, session.method, session.journal
    last, train = session.batches.steps, session.batches.train
    session.validator.catch_up(session.folder, done, last, options.val_every)
    with training_feed(train, done, last, session.process.device) as feed:
        for step in session.control.steps(last, session.saver):
            loss_sum = train_step(session, step, islice(feed, train.accumulation))
            skipped = session.guard.after_step(step)
            change = method.after_step(step)
            journal.count(step)
            if change is not None:
                journal.rank_change(change)
            if skipped or journal.due(step, last):
                journal.log(step, loss_sum, session.engine, method, skipped)
            if session.validator.due(step, last, options.val_every):
                session.validator.log(session.folder, step)
            session.saver.after_step(step, last)
    if not session.control.stopping and done < last:
        session.validator.log(session.folder, last)


def train_step(session: Session, step: int, micro_batches: Iterable[MicroBatch]) -> Tensor:
    """One global step over this process's micro-batches; the sum of their token losses, left on the device.

    The loss is the token losses' sum over the number of target tokens of the whole global batch. The engine averages
    gradients over processes and micro-steps, so each micro-batch's sum is multiplied by their number first.
    """
    import torch

    from launch.model.token_loss import head_of, token_loss

    engine, device = session.engine, session.process.device
    head = head_of(engine.module)
    targets = session.batches.train.target_tokens(step)
    weight = engine.gradient_accumulation_steps() * engine.world_size / targets
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in micro_batches:
        session.method.before_forward(batch, device)
        loss = session.guard.checked(token_loss(engine, batch, device, head), batch)
        engine.backward(loss * weight)
        session.journal.before_update(engine)
        engine.step()
        total += loss.detach().double()
    return total


def introduce(session: Session, start: Start) -> None:
    """Say what is about to happen, and what of it deserves a doubt."""
    from flexlora_ds.schedule import describe, due_steps

    options, method, batches = session.options, session.method, session.batches
    dropped = batches.tokenised.dropped_line()
    lines = [
        f"{options.method}: {len(method.matrices)} matrices, {method.trainable_parameters:,} trainable parameters",
        f"{len(batches.tokenised.train):,} records, {batches.steps:,} steps of {options.batch_size}",
    ]
    if options.method == "flexlora":
        config = options.to_flexlora_config()
        lines.append(describe(batches.steps, config, method.total_rank))
        if config.adjust_size and not due_steps(batches.steps, config):
            session.journal.warn("no rank change falls into this calendar; ranks stay as they are")
    for line in ([dropped] if dropped else []) + lines + start.messages:
        session.journal.progress.message(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one line and an exit code."""
    quiet_libraries()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--help" in arguments or "-h" in arguments:
        show_help()
        return 0

    def body() -> None:
        run(parse_options(arguments))

    return guarded(body, debug=lambda: debug_wanted(arguments, DEFAULT_RECIPE))


def show_help() -> None:
    """Print every key with its default and what it means, from process 0."""
    from launch.options.help import help_text

    if os.environ.get("RANK", "0") == "0":
        print(help_text(), end="")


def run(options: TrainOptions) -> None:
    """The dry run's page, or the run."""
    if options.dry_run:
        from launch.planning.dry_run import dry_run

        dry_run(options)
        return
    from launch.distributed.signals import Watch

    with Watch() as watch:
        train(options, watch)


def program() -> int:
    """`main` in a process of its own, which leaves the others when the run is done."""
    code = main()
    if "torch" in sys.modules:
        from launch.distributed.process import leave_processes

        leave_processes(done=code == 0)
    return code


if __name__ == "__main__":
    sys.exit(program())
