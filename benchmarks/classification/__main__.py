"""How a start from the gradient learns to classify: a pretrained encoder with a new head, on rows of GLUE.

    python -m benchmarks.classification --model DIR --data DIR [--task sst2|cola] [--seeds 1,2,3]
                                        [--settings NAME;NAME] [--jobs 2] [--out runs/classification]

DATA holds a folder for each task, with train.jsonl and validation.jsonl in the hub's columns. A run trains the head
alone for a few steps, then head and adapters, in one process of plain torch. Runs of a seed share head, rows and their
order, so settings are compared within a seed. The table has means over the seeds, and in brackets the mean difference
to the Gaussian start of the same seed with its 95 % interval (bootstrap over the seeds). A run that has finished is
not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.classification.rows import TASKS
from benchmarks.classification.run import Plan, run
from benchmarks.classification.settings import REFERENCE, SETTINGS, USUAL
from benchmarks.intervals import paired_difference
from flexlora_ds.errors import UserError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.files.reading import read_json_object
from flexlora_ds.files.text import write_json_atomically
from flexlora_ds.terminal.command import CommandParser, exit_code_of

PARTS = 4
"""Parts of a run whose mean training losses are shown; every row is seen once, so they are losses on fresh rows."""


def parse() -> argparse.Namespace:
    """The command line."""
    plan = Plan("", "")
    parser = CommandParser("python -m benchmarks.classification", __doc__)
    parser.add_argument("--model", required=True, help="folder of an encoder: BERT's architecture")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--settings", default=";".join(USUAL), help="; between them: " + "; ".join(SETTINGS))
    parser.add_argument("--steps", type=int, default=plan.steps)
    parser.add_argument("--head_steps", type=int, default=plan.head_steps)
    parser.add_argument("--batch_size", type=int, default=plan.batch_size)
    parser.add_argument("--rank", type=int, default=plan.rank)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--out", type=Path, default=Path("runs/classification"))
    args = parser.parse_args()
    unknown = [name for name in args.settings.split(";") if name not in SETTINGS]
    if unknown:
        parser.error(f"--settings: no {unknown[0]!r}; there are {'; '.join(SETTINGS)}")
    if args.steps < PARTS:
        parser.error(f"--steps {args.steps}: give at least {PARTS}")
    return args


def figures(found: dict[str, Any]) -> dict[str, float]:
    """What a run came to."""
    parts = np.array_split(found["losses"], PARTS)
    means = {f"loss {k + 1}/{PARTS}": float(np.mean(part)) for k, part in enumerate(parts)}
    return {**means, "validation": found["validation"], "accuracy": found["accuracy"]}


def table(rows: dict[tuple[str, int], dict[str, float]], settings: list[str], seeds: list[int]) -> str:
    """Markdown: means over the seeds, and differences to the Gaussian start where that was run."""
    columns = list(next(iter(rows.values())))
    lines = []
    for setting in settings:
        cells = []
        for column in columns:
            values = [rows[setting, seed][column] for seed in seeds]
            cell = f"{np.mean(values):.4f}"
            if REFERENCE in settings and setting != REFERENCE:
                cell += f" ({paired_difference(values, [rows[REFERENCE, seed][column] for seed in seeds])})"
            cells.append(cell)
        lines.append([setting, *cells])
    return markdown_table(["", *columns], lines)


def check_plan(out: Path, plan: Plan) -> None:
    """Refuse a folder whose runs had other options: they would not be repeated."""
    path = out / "plan.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists() and read_json_object(path) != asdict(plan):
        raise UserError("the runs there had other options", str(out), "give another --out")
    write_json_atomically(path, asdict(plan))


def main() -> int:
    """Run what has not been run, and print the table."""

    def compare() -> None:
        args = parse()
        settings, seeds = args.settings.split(";"), [int(seed) for seed in args.seeds.split(",")]
        plan = Plan(
            args.model, str(args.data / args.task), args.steps, args.head_steps, args.batch_size, args.rank
        )
        check_plan(args.out, plan)
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        files = {key: run_file(args.out, *key) for key in product(settings, seeds)}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = [
                pool.submit(run, plan, setting, seed, str(file), threads)
                for (setting, seed), file in files.items()
                if not file.exists()
            ]
            for future in waiting:
                done = future.result()
                print(f"{done['setting']}, seed {done['seed']}: done", flush=True)
        print(table({k: figures(read_json_object(f)) for k, f in files.items()}, settings, seeds), end="")

    return exit_code_of(compare)


def run_file(out: Path, setting: str, seed: int) -> Path:
    """Where a run's result stands."""
    words = setting.replace(",", "").replace(" ", "-")
    return out / f"{words}-{seed}.json"


if __name__ == "__main__":
    sys.exit(main())
