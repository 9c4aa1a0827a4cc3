"""What a save costs the training: the time lost per save over the time of a step, in one run, interleaved.

    python -m benchmarks.saving_cost [--pairs 8] [--block 8] [any option of launch/train.py]
    deepspeed --module benchmarks.saving_cost ...        torchrun --nproc_per_node 2 -m benchmarks.saving_cost ...

Without --model it makes a base of the demo's size, without --data the demo's records. A pair is `block` steps during
which one checkpoint is copied, written and completed, beside as many steps without one; pairs alternate in their
order, and the figure is the median over them, with the quartiles. Beside the time on the clock it gives the
processor's time of process 0, its writing thread included, which a busy machine leaves as it is. Ranks stay as they
are meanwhile. The aim is below one step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.command import quiet_libraries
from launch.options.train_options import TrainOptions, parse_options

if TYPE_CHECKING:
    from launch.distributed.signals import SignalWatcher
    from launch.loop.session import Session

WARM_UP = 3  # steps


@dataclass(frozen=True)
class Block:
    """Some steps: seconds on the clock, and of this process on its processors; of the copy alone on the clock."""

    clock: float
    processor: float
    copy: float = 0.0


def run_block(session: Session, first: int, steps: int, *, save: bool) -> Block:
    """Train `steps` steps, with one whole save among them or none."""
    from deepspeed import comm

    from launch.distributed.agreement import largest
    from launch.train import train_step

    saver = session.saver
    comm.barrier()
    clock, processor, copied = time.perf_counter(), time.process_time(), 0.0
    if save:
        saver.begin(first)
        copied = time.perf_counter() - clock
    for step in range(first, first + steps):
        if not largest(session.process, [saver.busy])[0]:
            saver.complete()
        batch = session.data.train.batch(step)
        train_step(session, batch)
        session.guard.after_step(step)
        session.method.after_step(step)
        session.log.count(batch)
    saver.complete()
    if session.process.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    comm.barrier()
    return Block(time.perf_counter() - clock, time.process_time() - processor, copied)


def measure(session: Session, pairs: int, steps: int) -> list[tuple[Block, Block]]:
    """(with a save, without) for every pair, after a warm-up."""
    run_block(session, 1, WARM_UP, save=True)
    done, found = 1 + WARM_UP, []
    for pair in range(pairs):
        blocks = {}
        for save in (pair % 2 == 0, pair % 2 == 1):
            blocks[save] = run_block(session, done, steps, save=save)
            done += steps
        found.append((blocks[True], blocks[False]))
    return found


def quartiles(values: Sequence[float]) -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def report(found: list[tuple[Block, Block]], steps: int, checkpoint: Path) -> str:
    """Lost over step, by both clocks."""
    lines = []
    for name in ("clock", "processor"):
        pairs = [(getattr(a, name), getattr(b, name) / steps) for a, b in found]
        lost = [(with_save - steps * step) / step for with_save, step in pairs]
        step = statistics.median(step for _, step in pairs)
        lines.append(f"{name:10} step {step:8.4f} s   lost per save {quartiles(lost)} steps")
    copies = quartiles([a.copy * steps / b.clock for a, b in found])
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    lines.append(f"of it standing still for the copy {copies} steps; a checkpoint has {size / 1e6:.2f} MB")
    return "\n".join(lines)


def body(options: TrainOptions, pairs: int, steps: int, watcher: SignalWatcher) -> None:
    """Open a run as the training command does, and measure in it."""
    from launch.data.prepare import load_tokenizer_of, prepare_data, share_batches
    from launch.distributed.process import join_processes, world_size_of_environment
    from launch.loop.session import begin, identify, run_folder
    from launch.planning.settle import settle
    from launch.run_folder.resume import Start

    world_size = world_size_of_environment()
    settled = settle(options, world_size)
    options = settled.options
    tokenizer = load_tokenizer_of(options)
    data = prepare_data(options, tokenizer)
    process = join_processes()
    watcher.follow(process, options.timeout)
    with run_folder(options, process) as folder:
        identity = identify(options, data, process)
        batches = share_batches(
            options, data, settled.layout, process, tokenizer.pad_token_id, packed=settled.computation.packed
        )
        session = begin(settled, folder, process, batches, identity, Start(), watcher)
        found = measure(session, pairs, steps)
        if process.is_rank_zero:
            newest = max(folder.checkpoints.glob("step_*"))
            print(
                f"\n{Path(options.model).name}, {session.method.trainable_parameters:,} trainable parameters, "
                f"{settled.line()}, {world_size} process(es) on {process.device}, {Path(options.ds).name}, "
                f"batch {options.batch_size}; {pairs} pairs of {steps} steps"
            )
            print(report(found, steps, newest))
        watcher.part(process)


def demo_place(root: Path) -> dict[str, Any]:
    """A base of the demo's shape and its records; what the base has learnt is no matter here."""
    from data_prep.__main__ import main as prepare
    from launch.demo.base_model import BaseRecipe, make_base

    make_base(root / "base", BaseRecipe(steps=1))
    prepare(["--demo", "--out", str(root / "data")])
    return {"model": str(root / "base"), "data": str(root / "data" / "commonsense_170k.json")}


def main() -> int:
    """Print the figures; the exit code."""
    quiet_libraries()
    return exit_code_of(compare)


def compare() -> None:
    """Parse the command line, and run in a scratch folder where it names none."""
    from launch.distributed.signals import SignalWatcher

    parser = CommandParser("python -m benchmarks.saving_cost", __doc__)
    parser.add_argument("--pairs", type=int, default=8, help="at least 2 (%(default)s)")
    parser.add_argument("--block", type=int, default=8, help="steps in each half of a pair (%(default)s)")
    own, words = parser.parse_known_args()
    steps = WARM_UP + 2 * own.pairs * own.block + 1
    fixed = ["--adjust_size=0", f"--max_steps={steps}", "--save_every=0", "--resume=auto"]
    with tempfile.TemporaryDirectory() as scratch, SignalWatcher() as watcher:
        if not any(word.startswith("--model") for word in words):
            place = demo_place(Path(scratch))
            words = ["--recipe=demo", *words, *(f"--{key}={value}" for key, value in place.items())]
        if not any(word.startswith("--out") for word in words):
            words.append(f"--out={scratch}/run")
        body(parse_options([*words, *fixed]), own.pairs, own.block, watcher)


if __name__ == "__main__":
    sys.exit(main())
