"""How settings of the method learn, beside PEFT's LoRA: the same short runs over several seeds.

    python -m benchmarks.learning --model MODEL --data RECORDS [--seeds 1,2,3] [--settings NAME,NAME] [--jobs 2]
                                  [--out runs/learning] [any option of launch/train.py, for all runs]

Each run is `launch/train.py` with one process, at fixed ranks or growing once (`grow`). Runs of a seed share
records, their order and dropout masks, so settings are compared within a seed. The table has the mean over seeds of:
the mean training loss over thirds of the run, the validation loss at its middle and its end, the mean of ‖PᵀP − I‖_F
and ‖QQᵀ − I‖_F, how far λ are from the true singular values, and the rank correlation of the matrices' entropies by
λ and by the true ones. In brackets: the smallest and largest over the seeds of the difference to LoRA's validation
loss. A run that has finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flexlora_ds.checkpoint.adapter import masters_of
from flexlora_ds.checkpoint.files import checkpoints_in
from flexlora_ds.checkpoint.state import open_checkpoint
from flexlora_ds.command import CommandParser, exit_code_of
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.importance import exact_spectrum, score_matrices, spectrum_error

LORA = "LoRA"
GROWING = {
    "rank": 4, "alpha": 8, "max_rank": 8, "direction": "expand", "adjust_size": 10_000, "schedule": "constant",
    "adjust_start": 19, "adjust_interval": 1,
}  # fmt: skip
"""From rank 4 to 8 in every matrix, one direction a step after steps 20 to 23, then fixed."""
SETTINGS: dict[str, dict[str, object]] = {
    LORA: {"method": "lora"},
    "default": {},
    "gradient": {"init": "gradient"},
    "lambda-8": {"lambda_lr": 8},
    "lambda-60": {"lambda_lr": 60},
    "eta-0.2": {"orth_weight": 0.2},
    "eta-0.01": {"orth_weight": 0.01},
    "norm": {"orth_form": "norm", "orth_weight": 0.1},
    "squared": {"orth_form": "squared", "orth_weight": 0.1},
    "none": {"orth_weight": 0},
    "grow": GROWING,
    "grow-orthogonal": {**GROWING, "new_direction": "orthogonal"},
    "grow-gradient": {**GROWING, "new_direction": "gradient"},
}
"""What each changes in the defaults (`lambda_lr: auto`, `orth_form: decoupled`, `orth_weight: 0.05`)."""

STEPS = 120
FIXED = {
    "ds": "ds_configs/zero2.json", "rank": 8, "alpha": 16, "lr": 3e-4, "max_steps": STEPS, "warmup_steps": 12,
    "val_size": 64, "val_every": STEPS // 2, "adjust_size": 0, "log_every": 1, "save_every": 0,
}  # fmt: skip
"""The options of all runs, before those of the command line."""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to `launch/train.py`."""
    parser = CommandParser("python -m benchmarks.learning", __doc__)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args, words = parser.parse_known_args()
    unknown = [name for name in args.settings.split(",") if name not in SETTINGS]
    if unknown:
        parser.error(f"--settings: no {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return args, words


def train(setting: str, seed: int, out: Path, words: Sequence[str], threads: int) -> Path:
    """One run in a process of its own; returns its folder.

    Raises:
        RunError: it failed; the message ends with what it said last.
    """
    folder = out / f"{setting}-{seed}"
    if (folder / "summary.json").exists():
        return folder
    options = {**FIXED, **SETTINGS[setting], "seed": seed, "out": folder}
    given = [f"--{key}={value}" for key, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "launch/train.py", *given, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        last = (done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise RunError(f"{folder} ended with {done.returncode}: {last}")
    print(f"{folder}: done", flush=True)
    return folder


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(folder: Path) -> dict[str, float]:
    """What a run came to."""
    losses = [row["loss"] for row in lines_of(folder / "metrics.jsonl")]
    found = {f"loss {k + 1}/3": float(np.mean(part)) for k, part in enumerate(np.array_split(losses, 3))}
    middle, end = (row["loss"] for row in lines_of(folder / "validation.jsonl")[-2:])
    return {**found, "val, middle": middle, "val, end": end, **spectra(folder)}


def spectra(folder: Path) -> dict[str, float]:
    """How far λ are from singular values at the end of a run; nothing for LoRA."""
    checkpoint = open_checkpoint(checkpoints_in(folder / "checkpoints")[-1])
    if not checkpoint.ranks:
        return {}
    by_lambda, exact, violations = {}, {}, []
    for name, matrix in masters_of(checkpoint).items():
        grams = [(m.T @ m).double() for m in (matrix.P, matrix.Q.T)]
        violations += [float((gram - gram.new_ones(len(gram)).diag()).norm()) for gram in grams]
        by_lambda[name], exact[name] = matrix.lam, exact_spectrum(*grams, matrix.lam)
    scores = [list(score_matrices(s, FlexLoRAConfig()).values()) for s in (by_lambda, exact)]
    ranks = [np.argsort(np.argsort(values)) for values in scores]
    return {
        "violation": float(np.mean(violations)),
        "spectrum error": float(np.mean([spectrum_error(by_lambda[n], exact[n]) for n in exact])),
        "entropies' rank correlation": float(np.corrcoef(*ranks)[0, 1]),
    }


def table(found: dict[tuple[str, int], dict[str, float]], settings: list[str], seeds: list[int]) -> str:
    """Markdown: means over seeds, and the spread of the last validation loss against LoRA's of the same seed."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = []
    for setting in settings:
        rows = [found[setting, seed] for seed in seeds]
        cells = [f"{np.mean([row[key] for row in rows]):.4f}" if key in rows[0] else "" for key in columns]
        if LORA in settings:
            gaps = [found[setting, seed]["val, end"] - found[LORA, seed]["val, end"] for seed in seeds]
            cells[columns.index("val, end")] += f" ({min(gaps):+.4f} to {max(gaps):+.4f})"
        lines.append([setting, *cells])
    return markdown_table(["", *columns], lines)


def main() -> int:
    """Run what has not been run, and print the table."""

    def run() -> None:
        args, words = parse()
        settings, seeds = args.settings.split(","), [int(seed) for seed in args.seeds.split(",")]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {
                (setting, seed): pool.submit(train, setting, seed, args.out, words, threads)
                for seed, setting in product(seeds, settings)
            }
            found = {key: figures(job.result()) for key, job in jobs.items()}
        args.out.joinpath("figures.json").write_text(
            json.dumps([{"setting": s, "seed": n, **row} for (s, n), row in found.items()], indent=1) + "\n",
            encoding="utf-8",
        )
        print(table(found, settings, seeds), end="")

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
