"""How settings of the method learn, beside PEFT's LoRA: the same short runs over several seeds.

    python -m benchmarks.learning --model MODEL --data RECORDS [--seeds 1,2,3] [--settings NAME,GROUP] [--jobs 2]
                                  [--lrs 1e-4,3e-4,1e-3] [--reference LoRA] [--held_out 192] [--out runs/learning]
                                  [any option of launch/train.py, for all runs]

Each run is `launch/train.py` with one process. Runs of a seed share records, their order and dropout masks, so
settings are compared within a seed. With --lrs each setting runs at every rate on the first seed, and the others at
the one of its lowest last validation loss. A finished run is not repeated, and an interrupted one goes on.

With --held_out N every adapter is measured in fp32 on N records that its run neither trained on nor held out. Rates are
chosen by that loss then. The records are the same for all runs of a seed.

The tables are Markdown; the figures of every run lie in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.learning.comparison import Comparison, compare
from benchmarks.learning.figures import figures
from benchmarks.learning.further import FurtherRecords
from benchmarks.learning.runs import Runner
from benchmarks.learning.settings import GROUPS, LORA, SETTINGS, named
from benchmarks.learning.tables import page
from flexlora_ds.terminal.command import CommandParser, exit_code_of


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to `launch/train.py`."""
    parser = CommandParser("python -m benchmarks.learning", __doc__)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="settings, and groups of them")
    parser.add_argument("--lrs", default="", help="learning rates to choose from, on the first seed")
    parser.add_argument("--reference", help=f"the setting to compare with (default: {LORA}, where it runs)")
    parser.add_argument("--held_out", type=int, default=0, help="further records to measure on; 0: none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args, words = parser.parse_known_args()
    if args.held_out < 0:
        parser.error(f"--held_out: {args.held_out} is no number of records")
    try:
        args.settings = named(args.settings)
    except ValueError as unknown:
        there = ", ".join([*SETTINGS, *GROUPS])
        parser.error(f"--settings: no {unknown.args[0]!r}; there are {there}")
    if args.reference is None and LORA in args.settings:
        args.reference = LORA
    elif args.reference not in (None, *args.settings):
        parser.error(f"--reference: {args.reference!r} is not among --settings")
    return args, words


def write_figures(comparison: Comparison, out: Path) -> None:
    """Every run's figures as JSON."""
    rows = [{"setting": run.setting, "seed": run.seed, **row} for run, row in comparison.found.items()]
    out.joinpath("figures.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def run() -> None:
    """Run what has not been run, and print the tables."""
    args, words = parse()
    runner = Runner(args.out, tuple(words), args.jobs)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rates = [rate for rate in args.lrs.split(",") if rate]
    further = FurtherRecords(args.held_out)
    comparison = compare(
        runner,
        args.settings,
        seeds,
        rates,
        args.reference,
        lambda folder: figures(folder) | further.figures(folder),
    )
    write_figures(comparison, args.out)
    print(page(comparison), end="")


def main() -> int:
    """Return 0, 2 after an error the user must change something for, 1 for what failed."""
    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
