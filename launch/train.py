"""Train an adapter on a base model with DeepSpeed: a run from top to bottom.

    deepspeed launch/train.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]

`--help` lists every key. torchrun and plain python start it as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a launcher puts this folder on the path; the packages are beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.edge import guarded, quiet_libraries
from launch.options import TrainOptions, parse_options


def train(options: TrainOptions) -> None:
    """The whole run.

    Raises:
        UserError, DataError: what the user must change. RunError: what failed.
    """
    from launch.build import build_engine, cut_batches, load_tokenizer_of, prepare_data, require_data
    from launch.ds_config import resolve_ds_config
    from launch.finish import finish
    from launch.journal import Journal
    from launch.memory_plan import plan_memory
    from launch.processes import join_processes, world_size_of_environment
    from launch.progress import Progress
    from launch.run_folder import RunFolder
    from launch.validation import Validator

    world_size = world_size_of_environment()
    require_data(options)
    plan = plan_memory(options.replace(dtype=options.compute_dtype()), world_size)
    repeatable, layout = plan.options, plan.layout()
    options = repeatable.replace(micro_batch_size=layout.micro_batch_size)
    ds_config = resolve_ds_config(options.ds, options, world_size, hidden_size=plan.config.hidden_size)
    tokenizer = load_tokenizer_of(options)
    data = prepare_data(options, tokenizer)
    process = join_processes()
    folder = RunFolder(options.out, writes=process.first)
    folder.prepare(options.resume)
    folder.start_anew()
    batches = cut_batches(options, data, layout, process, tokenizer.pad_token_id)
    engine, method = build_engine(options, ds_config, batches.steps, process)
    folder.write_options(repeatable.to_yaml())
    progress = Progress(batches.steps, log_every=options.log_every, shows=process.first)
    journal = Journal(options, folder, batches.train, progress, process.device)
    validator = Validator(engine, method, batches.validation, process.device)
    method.attach(engine, batches.steps, validator if options.val_every != 0 else None)
    introduce(options, method, batches, progress)

    initial_parameters = method.trainable_parameters
    validator.log(folder, 0)
    for step in range(1, batches.steps + 1):
        skipped_before = engine.skipped_steps
        loss_sum = train_step(engine, method, batches.train, step, process.device)
        change = method.after_step(step)
        journal.count(step)
        if change is not None:
            journal.rank_change(change)
        if journal.due(step, batches.steps):
            journal.log(step, loss_sum, engine, method, engine.skipped_steps > skipped_before)
        if isinstance(options.val_every, int) and options.val_every and step % options.val_every == 0:
            validator.log(folder, step)
    validator.log(folder, batches.steps)
    finish(options, engine, method, journal, batches.steps, initial_parameters)


def train_step(engine: Any, method: Any, batches: Any, step: int, device: Any) -> Any:
    """One global step; the sum of this process's token losses, left on the device.

    The loss is the token losses' sum over the number of target tokens of the whole global batch. The engine averages
    gradients over processes and micro-steps, so each micro-batch's sum is multiplied by their number first.
    """
    import torch

    from launch.token_loss import takes_positions, token_loss

    at_positions = takes_positions(engine.module)
    parts = engine.gradient_accumulation_steps() * engine.world_size
    weight = parts / batches.target_tokens(step)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches.micro_batches(step):
        method.before_forward(batch, device)
        loss = token_loss(engine, batch, device, at_positions=at_positions)
        engine.backward(loss * weight)
        engine.step()
        total += loss.detach().double()
    return total


def introduce(options: TrainOptions, method: Any, batches: Any, progress: Any) -> None:
    """Say what is about to happen, and what of it deserves a doubt."""
    from flexlora_ds.schedule import describe, due_steps

    dropped = batches.tokenised.dropped_line()
    lines = [
        f"{options.method}: {len(method.matrices)} matrices, {method.trainable_parameters:,} trainable parameters",
        f"{len(batches.tokenised.train):,} records, {batches.steps:,} steps of {options.batch_size}",
    ]
    if options.method == "flexlora":
        config = options.to_flexlora_config()
        lines.append(describe(batches.steps, config, method.total_rank))
        if config.adjust_size and not due_steps(batches.steps, config):
            lines.append("warning: no rank change falls into this calendar; ranks stay as they are")
    for line in ([dropped] if dropped else []) + lines:
        progress.message(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one line and an exit code."""
    quiet_libraries()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--help" in arguments or "-h" in arguments:
        show_help()
        return 0

    def body() -> None:
        run(parse_options(arguments))

    debug = any(a in ("--debug=true", "--debug") for a in arguments)
    return guarded(body, debug=debug)


def show_help() -> None:
    """Print every key with its default and what it means, from process 0."""
    from launch.option_help import help_text

    if os.environ.get("RANK", "0") == "0":
        print(help_text(), end="")


def run(options: TrainOptions) -> None:
    """The dry run's page, or the run."""
    if options.dry_run:
        from launch.dry_run import dry_run

        dry_run(options)
    else:
        train(options)


if __name__ == "__main__":
    sys.exit(main())
