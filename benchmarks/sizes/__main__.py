"""Loss over size for one run: truncated after training, trained at each size, and PEFT's LoRA truncated.

    python -m benchmarks.sizes --model MODEL --data RECORDS [--setting gradient] [--lr 3e-4] [--lora_lr 1e-3]
                               [--fractions 0.75,0.5,0.25] [--min_rank 1] [--seeds 1,2,3] [--jobs 2]
                               [--out runs/learning] [any option of launch/train.py, for all runs]

The runs lie as `benchmarks.learning` leaves them: a finished one is taken from there, and what is missing is trained.
A smaller run has a smaller rank at the same scale alpha / rank. Truncation keeps the largest singular values of all
matrices by one threshold (`flexlora_ds.export --parameters`). Each adapter is measured on the records that its run held
out, in fp32. The whole ones, in their runs' own form and precision, must give the loss that the runs logged last, or
the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.learning.runs import Run, Runner
from benchmarks.learning.settings import LORA, SETTINGS
from benchmarks.sizes.curves import Family, measure, table
from benchmarks.sizes.picture import draw
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.options.train_options import parse_options


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to `launch/train.py`."""
    parser = CommandParser("python -m benchmarks.sizes", __doc__)
    parser.add_argument("--setting", default="gradient", choices=[name for name in SETTINGS if name != LORA])
    parser.add_argument("--lr", help="of that setting's runs")
    parser.add_argument("--lora_lr", help="of LoRA's runs")
    parser.add_argument("--fractions", default="0.75,0.5,0.25", help="of the parameters, to keep")
    parser.add_argument("--min_rank", type=int, default=1, help="directions that every matrix keeps")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: OUT/sizes.png)")
    return parser.parse_known_args()


def run() -> None:
    """Train what is missing, measure, and write table and picture."""
    args, words = parse()
    runner = Runner(args.out, tuple(words), args.jobs)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    fractions = [float(fraction) for fraction in args.fractions.split(",")]
    rank = parse_options(runner.arguments(Run(args.setting, seeds[0], args.lr))).rank
    family = Family(args.setting, args.lr, args.lora_lr, fractions, rank, args.min_rank)
    runner.train_all(run for seed in seeds for run in family.runs(seed))
    points = [point for seed in seeds for point in measure(family, runner, seed)]
    args.out.joinpath("sizes.json").write_text(
        json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8"
    )
    draw(points, args.picture or args.out / "sizes.png")
    print(table(points), end="")


def main() -> int:
    """Return 0, 2 after an error the user must change something for, 1 for what failed."""
    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
