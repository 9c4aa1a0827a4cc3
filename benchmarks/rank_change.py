"""What a rank change costs, in steps, in bytes and in memory that never comes back.

    python -m benchmarks.rank_change [--shape smollm2] [--ranks 8,32] [--processes 1,2] [--stages 0,1,2,3]
                                     [--changes 5] [--block 2] [--memory_changes 1000] [--json FILE]

It trains FlexLoRA on models of random weights, once for every combination of shape, rank, stage and number of
processes, in real processes of its own (gloo on CPUs, one GPU each where there are some). Nothing is downloaded.

Time. Blocks of steps with one rank change and blocks without take turns in one run, on the same records in both.
  `s per step`       the median step of the blocks without a change
  `s per change`     the median time inside a change: deciding, moving states, rebuilding DeepSpeed's optimizer
  `change : step`    the same over the mean step of the block beside it; median over the changes, 95 % by the bootstrap
  `steps lost`       how much longer a block takes for the change in it, in steps: what follows the change included
Bytes. `sent` is what each process sends to others for one change, beyond what it sends after an ordinary step: the
  bytes of every collective, DeepSpeed's included, times (n - 1)/n as a ring moves them, twice that for an all-reduce.
Memory. At ZeRO stage 3 ranks change after every step of a smaller model (--memory_shape); `grown` is how far the
  resident memory rose from a tenth of the changes to all of them, in the process where it rose most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.change_worker import Setting, measure
from benchmarks.intervals import paired_ratio
from benchmarks.shapes import SHAPES
from flexlora_ds.errors import UserError
from flexlora_ds.files.markdown import markdown_row, markdown_table
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.command import quiet_libraries

MIB = 2**20
MEMORY_STAGE = 3
MEMORY_BATCH = 2
HEAD = (
    "shape", "rank", "trainable", "stage", "processes", "s per step", "s per change", "change : step (95 %)",
    "steps lost (95 %)", "sent, MiB", "collectives",
)  # fmt: skip
MEMORY_HEAD = ("shape", "trainable", "processes", "changes", "resident, MiB", "grown, MiB", "s per change")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = CommandParser("python -m benchmarks.rank_change", __doc__)
    add = parser.add_argument
    add("--shape", type=names, default="smollm2", help=f"of {', '.join(SHAPES)}; a list (%(default)s)")
    add("--ranks", type=numbers(1), default="8,32", help="initial ranks: trainable parameters (%(default)s)")
    add("--processes", type=numbers(1), default="1,2", help="numbers of processes (%(default)s)")
    add("--stages", type=numbers(0, 3), default="0,1,2,3", help="ZeRO stages (%(default)s)")
    add("--changes", type=number(0), default=5, help="timed changes of a run; 0: no times (%(default)s)")
    add("--block", type=number(1), default=2, help="steps of a block; a pair has one change (%(default)s)")
    add("--adjust_size", type=number(1), default=4, help="directions that move in a change (%(default)s)")
    add("--batch_size", type=number(1), default=8, help="records of each process in a step (%(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="bf16 on GPUs, fp32 on CPUs")
    add("--device", choices=("cpu", "cuda"), help="GPUs where there are some")
    add("--memory_changes", type=number(0), default=1000, help="changes; 0: no memory (%(default)s)")
    add("--memory_shape", choices=SHAPES, default="smollm2-layers", help="(%(default)s)")
    add("--memory_rank", type=number(1), default=32, help="(%(default)s)")
    add("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args(arguments)
    if args.json and not args.json.parent.is_dir():
        raise UserError(
            f"there is no folder {args.json.parent}", f"--json {args.json}", "make it, or name another"
        )
    if 0 < args.memory_changes < 10:
        raise UserError(
            f"--memory_changes {args.memory_changes} is too few to see growth", mend="give at least 10"
        )
    return args


def numbers(low: int, high: int | None = None) -> Any:
    """A parser of comma-separated whole numbers in a range."""
    one = number(low, high)

    def parsed(text: str) -> list[int]:
        return [one(word) for word in text.split(",")]

    return parsed


def number(low: int, high: int | None = None) -> Any:
    """A parser of one whole number in a range."""
    span = f"{low} to {high}" if high is not None else f"{low} or more"

    def parsed(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {span}")
        return int(text)

    return parsed


def names(text: str) -> list[str]:
    """Comma-separated names of shapes."""
    for name in text.split(","):
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    return text.split(",")


def run(arguments: Sequence[str] | None = None) -> None:
    """Measure every setting, print the tables, write the JSON. Raises UserError, RunError."""
    args = parse(arguments)
    gpus = gpu_count(args)
    dtype = args.dtype or ("bf16" if gpus else "fp32")
    started = time.monotonic()
    timed, memory = [], []
    if args.changes:
        print(markdown_table(HEAD, []), end="", flush=True)
        for shape, rank, count, stage in itertools.product(
            args.shape, args.ranks, args.processes, args.stages
        ):
            setting = Setting(
                shape, rank, stage, count, dtype, args.batch_size, args.adjust_size, args.changes, args.block
            )
            timed.append(summary(setting, measure(setting, cpu=not gpus)))
            print(markdown_row(cells(timed[-1])), flush=True)
    if args.memory_changes:
        print("\n" + markdown_table(MEMORY_HEAD, []), end="", flush=True)
        for count in args.processes:
            setting = Setting(
                args.memory_shape, args.memory_rank, MEMORY_STAGE, count, dtype, MEMORY_BATCH, args.adjust_size,
                args.memory_changes, 0,
            )  # fmt: skip
            memory.append(growth(setting, measure(setting, cpu=not gpus)))
            print(markdown_row(memory_cells(memory[-1])), flush=True)
    print(f"\n{conditions(args, gpus, dtype)}; {time.monotonic() - started:.0f} s in all")
    if args.json:
        report = {"conditions": conditions(args, gpus, dtype), "timed": timed, "memory": memory}
        write_text_atomically(args.json, json.dumps(report, indent=1) + "\n")


def gpu_count(args: argparse.Namespace) -> int:
    """How many GPUs are used; 0 on CPUs. Raises UserError where there are not enough."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and args.device != "cpu" else 0
    if args.device == "cuda" and not gpus:
        raise UserError("this machine has no GPU that torch can use", "--device cuda", "leave it out")
    if gpus and max(args.processes) > gpus:
        raise UserError(
            f"there are {gpus} GPUs", f"--processes {max(args.processes)}", "give as many, or fewer"
        )
    return gpus


def summary(setting: Setting, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ratios of one setting, by the clock of process 0."""
    first = found[0]
    steps = [statistics.mean(block) for block in first["steps_without"]]
    lost = [sum(a) - sum(b) for a, b in zip(first["steps_with"], first["steps_without"], strict=True)]
    return {
        "setting": vars(setting),
        "trainable": first["trainable"],
        "step_seconds": statistics.median(itertools.chain(*first["steps_without"])),
        "change_seconds": statistics.median(first["change_seconds"]),
        "change_over_step": paired_ratio(first["change_seconds"], steps).to_dict(),
        "steps_lost": paired_ratio(lost, steps).to_dict(),
        "sent_bytes": max(one["sent_bytes"] for one in found),
        "collectives": first["collectives"],
        "processes": found,
    }


def growth(setting: Setting, found: list[dict[str, Any]]) -> dict[str, Any]:
    """How far resident memory rose from a tenth of the changes to all of them, where it rose most."""
    ends = [(samples[min(samples, key=int)], samples[max(samples, key=int)]) for samples in
            (one["resident_mib"] for one in found)]  # fmt: skip
    begin, end = max(ends, key=lambda pair: pair[1] - pair[0])
    return {
        "setting": vars(setting),
        "trainable": found[0]["trainable"],
        "resident_mib": [begin, end],
        "grown_mib": end - begin,
        "change_seconds": found[0]["change_seconds"],
        "processes": found,
    }


def cells(one: dict[str, Any]) -> list[str]:
    """A line of the table of times."""
    setting = one["setting"]
    return [
        setting["shape"], str(setting["rank"]), f"{one['trainable']:,}", str(setting["stage"]),
        str(setting["processes"]), f"{one['step_seconds']:.3f}", f"{one['change_seconds']:.3f}",
        interval(one["change_over_step"]), interval(one["steps_lost"]), f"{one['sent_bytes'] / MIB:.2f}",
        str(one["collectives"]),
    ]  # fmt: skip


def memory_cells(one: dict[str, Any]) -> list[str]:
    """A line of the table of memory."""
    setting = one["setting"]
    changes = setting["changes"]
    begin, end = one["resident_mib"]
    return [
        setting["shape"], f"{one['trainable']:,}", str(setting["processes"]), f"{changes // 10:,} to {changes:,}",
        f"{begin:,.0f} to {end:,.0f}", f"{one['grown_mib']:+.1f}", f"{one['change_seconds']:.3f}",
    ]  # fmt: skip


def interval(ratio: dict[str, float]) -> str:
    """`median (low to high)`."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def conditions(args: argparse.Namespace, gpus: int, dtype: str) -> str:
    """What the figures hold for, in one line."""
    import torch

    device = torch.cuda.get_device_name(0) if gpus else f"{os.cpu_count()} CPU cores"
    return (
        f"{device}, {dtype}, batch {args.batch_size} a process, {args.adjust_size} directions pruned and as many "
        f"added a change, {args.changes} changes, torch {torch.__version__}, DeepSpeed {version('deepspeed')}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> int:
    """The exit code: 0, 2 for what the user must change, 1 for what failed."""
    quiet_libraries()
    return exit_code_of(run, stoppable=True)  # SIGTERM ends the workers, too


if __name__ == "__main__":
    sys.exit(main())
