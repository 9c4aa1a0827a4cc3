"""Train an adapter on a base model with DeepSpeed: a run from top to bottom.

    deepspeed launch/train.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]

`--help` lists every key. torchrun and plain python start it as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a launcher puts this folder on the path; the packages are beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command import end_at_interrupt

    end_at_interrupt()
    from launch.options.command_line import leave_early

    leave_early(sys.argv[1:])  # answers `--help` and misspelt keys before torch is imported

import torch
from torch import Tensor

from flexlora_ds.schedule import describe, due_steps
from flexlora_ds.terminal.command import exit_code_of
from flexlora_ds.terminal.counted import counted
from launch.command import NOT_BEGUN
from launch.data.batches import GlobalBatch
from launch.data.prepare import load_tokenizer_of, prepare_data, share_batches, steps_of
from launch.data.template_date import resolve_template_date
from launch.data.vocabulary import length_doubt
from launch.distributed.agreement import on_all_ranks, on_rank_zero
from launch.distributed.bandwidth import measure_rate
from launch.distributed.link import find_link
from launch.distributed.members import gather_members
from launch.distributed.process import end_process, join_processes, world_size_of_environment
from launch.distributed.signals import SignalWatcher
from launch.engine.lr_schedule import peak_doubt
from launch.engine.methods.adalora_calendar import describe as adalora_calendar
from launch.engine.methods.registry import require_calendar
from launch.engine.settled import Settled
from launch.loop.accuracy import prepare_test
from launch.loop.compiled_layers import agree_on_layers
from launch.loop.finish import finish, stop
from launch.loop.gradient_start import begin_directions
from launch.loop.known_failures import known_failures
from launch.loop.memory_check import check_memory, compute_once
from launch.loop.session import Session, begin, identify, run_folder
from launch.loop.tracked import tracked
from launch.model.token_loss import head_of, token_loss
from launch.options.command_line import answer
from launch.options.debug import debug_wanted
from launch.options.train_options import DEFAULT_RECIPE, TrainOptions, parse_options
from launch.options.without_effect import idle_line
from launch.planning.dry_run import dry_run
from launch.planning.match_params import match_over
from launch.planning.memory_plan import memory_of
from launch.planning.settle import settle
from launch.planning.stage_choice import needless_stage_three
from launch.run_folder.resume import Start, continue_files, find_start


def train(options: TrainOptions, watcher: SignalWatcher) -> None:
    """The whole run; `watcher` notices signals and processes that end.

    Raises:
        UserError: what the user must change. RunError: what failed.
    """
    settled = settle(options, world_size_of_environment())
    options = settled.options
    tokenizer = load_tokenizer_of(options)
    process = join_processes(options.timeout)
    watcher.follow(process, options.timeout)
    settled = settled.dated(on_rank_zero(process, lambda: resolve_template_date(options, tokenizer)))
    options, vocabulary = settled.options, settled.skeleton.vocabulary
    data = on_all_ranks(process, lambda: prepare_data(options, tokenizer, vocabulary))
    steps = steps_of(options, data)
    on_all_ranks(process, lambda: require_calendar(options, steps))
    if settled.match is not None:
        settled = settled.with_match(match_over(settled.match, options, settled.skeleton.shapes, steps))
    test = on_all_ranks(process, lambda: prepare_test(options, tokenizer, vocabulary))
    with run_folder(options, process) as folder:
        identity = identify(options, data, process)
        start = find_start(options, folder, process, identity)
        watcher.say_ready(process)
        pad, packed = vocabulary.padding_id(tokenizer), settled.computation.packed
        shared = share_batches(options, data, settled.layout, process, pad, packed=packed)
        run = begin(settled, folder, process, shared, identity, start, watcher, test)
        continue_files(start, folder, process)
        folder.write_options(settled.repeatable.to_yaml())
        introduce(run, settled, start)
        # Some all-reduces, timed, and which host each process is on.
        look_at_machine(run, settled)
        # Below ZeRO-3 whether it fits everywhere; at ZeRO-3 the weights, which are sharded.
        check_memory(run, settled, start.step, memory_to_come(settled, start))
        if start.step < run.data.steps:
            # Whether a process takes its layers as they are.
            largest = run.data.train.largest
            agree_on_layers(
                run.engine.module,
                process,
                lambda: compute_once(run, largest(start.step, run.data.steps)),
            )
        if start.checkpoint is None:
            # The products with the gradient, to which each process adds its part of the first batches.
            begin_directions(run)
        with tracked(run, start):
            run_steps(run, start.step)
            if run.stop.reached:
                stop(run, watcher.reason)
            else:
                finish(run)
        watcher.part(process)


def introduce(run: Session, settled: Settled, start: Start) -> None:
    """Say what is about to happen, and what of it deserves a doubt."""
    options, method, data = run.options, run.method, run.data
    dropped = data.tokenised.dropped_line()
    of_what = (
        "all weights" if options.traits.trains_base else counted(len(method.matrices), "matrix", "matrices")
    )
    lines = [
        settled.line(),
        *([settled.match.line()] if settled.match else []),
        *settled.skeleton.remarks,
        f"{options.method}: {of_what}, {method.trainable_parameters:,} trainable parameters",
        *method.remarks,
        f"{data.tokenised.kept_words()}, {counted(data.steps, 'step')} of {options.batch_size}",
    ]
    if options.traits.changes_ranks:
        config = options.to_flexlora_config()
        lines.append(describe(data.steps, config, method.total_rank))
        if config.adjust_size and not due_steps(data.steps, config):
            run.log.warn("no rank change falls into this calendar; ranks stay as they are")
    elif options.method == "adalora":
        lines.append(adalora_calendar(data.steps, options, len(method.matrices)))
    if idle := idle_line(options):
        lines.append(idle)
    too_long = length_doubt(data.tokenised, settled.skeleton.vocabulary, options.data)
    found = (*method.doubts, too_long, peak_doubt(options, data.steps))
    for doubt in filter(None, found):
        run.log.warn(doubt)
    for line in ([dropped] if dropped else []) + lines + start.messages:
        run.log.progress.message(line)


def look_at_machine(run: Session, settled: Settled) -> None:
    """Say how fast the processes exchange numbers; warn where that is too slow, or ZeRO-3 is not needed; collective."""
    rate = measure_rate(run.process)
    doubts: list[str | None] = []
    if rate is not None:
        run.log.progress.message(str(rate))
        link = find_link(run.process, gather_members(run.process))
        doubts.append(None if link is None else link.doubt(rate, os.environ))
    if settled.stage == 3:
        doubts.append(needless_stage_three(memory_of(settled), settled.layout, rate))
    for doubt in doubts:
        if doubt is not None:
            run.log.warn(doubt)


def memory_to_come(settled: Settled, start: Start) -> float:
    """Bytes that the first step makes and keeps, beside what its backward pass makes.

    The optimizer's states, unless a checkpoint brought them; ZeRO's buffer, and from stage 2 on the reduced gradients.
    """
    estimate = memory_of(settled).at(settled.layout.micro_batch_size)
    states = estimate.states if start.checkpoint is None else 0.0
    buffer = estimate.buckets if settled.stage < 3 else 0.0  # at stage 3 it is there from the beginning
    return states + buffer + (estimate.gradients if settled.stage >= 2 else 0.0)


def run_steps(run: Session, done: int) -> None:
    """The steps after `done`, to the last one or until the processes agree to stop; then the last validation.

    What the processes say to each other stands at each line.
    """
    run.validator.before_first_step(done)
    run.log.progress.begin()
    run.accuracy.before_first_step(done)
    # The largest of three flags: the loop ends early when one process asks for it.
    for batch in run.batches(after=done):
        # The gradients' mean; at ZeRO-3 the weights too, which are sharded.
        loss_sum = train_step(run, batch)
        # After a skipped update: whose loss or gradient was not finite.
        skipped = run.guard.after_step(batch.step)
        # The masters of P, λ and Q, which ZeRO shards.
        change = run.method.after_step(batch.step)
        # Where due, the loss: each process has a part of the batch.
        run.log.step(batch, loss_sum, skipped, change)
        # Where due, the validation loss: each process has a part of the records.
        run.validator.after_step(batch.step)
        # Where due, the tests' items: each process answers a part of them.
        run.accuracy.after_step(batch.step)
        # Where due, the folder to write into, which process 0 makes.
        run.saver.after_step(batch.step)
    if not run.stop.reached and done < run.data.steps:
        run.validator.log(run.data.steps)


def train_step(run: Session, batch: GlobalBatch) -> Tensor:
    """One global step over this process's micro-batches; the sum of their token losses, left on the device.

    The loss is the token losses' sum over the number of target tokens of the whole global batch. The engine averages
    gradients over processes and micro-steps, so each micro-batch's sum is multiplied by their number first.
    """
    engine, device = run.engine, run.process.device
    head = head_of(engine.module)
    weight = engine.gradient_accumulation_steps() * engine.world_size / batch.target_tokens
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in batch.micro_batches:
        run.method.before_forward(micro_batch, device)
        loss = run.guard.checked(token_loss(engine, micro_batch, device, head), micro_batch)
        engine.backward(loss * weight)
        run.log.before_update()
        engine.step()
        total += loss.detach().double()
    return total


def start_run(options: TrainOptions) -> None:
    """The dry run's page, or the run."""
    if options.dry_run:
        dry_run(options)
        return
    with known_failures(), SignalWatcher() as watcher:
        train(options, watcher)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one line and an exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    code = answer(arguments)
    if code is not None:
        return code
    return exit_code_of(
        lambda: start_run(parse_options(arguments)),
        debug=lambda: debug_wanted(arguments, DEFAULT_RECIPE),
        interrupted=NOT_BEGUN,
    )


if __name__ == "__main__":
    end_process(main())
