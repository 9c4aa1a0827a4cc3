"""Section `study`: short runs of a model by several methods over seeds, side by side on the card.

It is `benchmarks.learning` within a share of the time. Each seed's runs go together, one process each. In fp32 the
validation loss of these few records is exact enough to compare methods by; in bf16 rounding moves it as far as they
differ.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.gpu.section import Conditions, Report
from benchmarks.intervals import paired_difference
from benchmarks.learning.comparison import Comparison, compare
from benchmarks.learning.runs import Run, Runner
from benchmarks.learning.settings import LORA
from benchmarks.learning.tables import page
from flexlora_ds.errors import RunError, UserError

SETTINGS = (LORA, "gaussian", "gradient", "alloc-entropy", "alloc-growth")
SEEDS = (1, 2, 3)
OPTIONS = {"lr": 1e-3, "dtype": "fp32", "val_size": 256, "save_every": 0}
"""In place of those of `benchmarks.learning`, for all runs."""
SETTINGS_TINY, SEEDS_TINY = (LORA, "alloc-growth"), (1, 2)
OPTIONS_TINY = OPTIONS | {
    "max_steps": 4, "warmup_steps": 1, "val_size": 5, "val_every": 2, "batch_size": 4, "rank": 4, "alpha": 8,
    "adjust_interval": 2, "adjust_start": 0, "adjust_freeze": 0,
}  # fmt: skip
RESERVE = 5.0
"""Seconds kept for reading the runs and comparing them."""
LOSS = "val, end"


def run(conditions: Conditions, report: Report) -> None:
    """As many whole seeds as the time allows; then every method's loss, and its difference from LoRA's."""
    if conditions.model is None or conditions.data is None:
        report.absent("study", "no model was given; --model MODEL --data RECORDS trains one")
        return
    tiny = conditions.tiny
    settings, seeds = (SETTINGS_TINY, SEEDS_TINY) if tiny else (SETTINGS, SEEDS)
    options = {"model": conditions.model, "data": conditions.data} | (OPTIONS_TINY if tiny else OPTIONS)
    words = tuple(f"--{key}={value}" for key, value in options.items())
    with tempfile.TemporaryDirectory(prefix="flexlora-") as scratch:
        study = Study(conditions, report, Path(scratch), words)
        finished, whole = study.train(settings, seeds)
        if whole:
            reference = LORA if LORA in finished else None
            show(compare(Runner(Path(scratch), words), finished, whole, [], reference), report)


@dataclass(frozen=True)
class Study:
    """Where runs go, and what all of them are told."""

    conditions: Conditions
    report: Report
    out: Path
    words: tuple[str, ...]

    def train(self, settings: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
        """The settings whose runs finished, and the seeds that are whole.

        A setting that fails on the first seed is left out of the others. A later seed with a failure does not count.
        """
        failed, took = self.train_seed(settings, seeds[0])
        finished = [setting for setting in settings if setting not in failed]
        whole = [seeds[0]] if finished else []
        for seed in seeds[1:] if finished else ():
            left = self.conditions.left - RESERVE
            if left < took:
                self.report.absent(f"seed {seed}", f"no time left: {left:.0f} s, the last took {took:.0f}")
                continue
            failed, took = self.train_seed(finished, seed)
            whole += [] if failed else [seed]
        return finished, whole

    def train_seed(self, settings: Sequence[str], seed: int) -> tuple[set[str], float]:
        """All runs of a seed, side by side; those that failed, and the seconds that all took."""
        tiny, began = self.conditions.tiny, time.monotonic()
        jobs = 1 if tiny else max(1, min(len(settings), (os.cpu_count() or 1) // 2))
        seconds = None if tiny else max(1.0, self.conditions.left - RESERVE)
        runner = Runner(self.out, self.words, jobs, seconds)

        def reason(setting: str) -> str:
            try:
                runner.train(Run(setting, seed))
            except (RunError, UserError) as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(jobs) as threads:
            reasons = dict(zip(settings, threads.map(reason, settings), strict=True))
        took = time.monotonic() - began
        failed = {setting for setting, why in reasons.items() if why}
        for setting in failed:
            self.report.absent(f"{setting}, seed {seed}", reasons[setting])
        self.report.figure(f"seed {seed}: {len(settings) - len(failed)} runs, {jobs} side by side", took, "s")
        return failed, took


def show(comparison: Comparison, report: Report) -> None:
    """The tables of `benchmarks.learning`; each method's loss and its interval as figures."""
    print(page(comparison), flush=True)
    for setting in comparison.settings:
        losses = [row[LOSS] for row in comparison.rows(setting)]
        report.figure(f"{setting}: last validation loss", float(np.mean(losses)), each=losses)
        if comparison.reference in (None, setting):
            continue
        others = [row[LOSS] for row in comparison.rows(comparison.reference)]
        gap = paired_difference(losses, others)
        name = f"{setting} minus {comparison.reference}, with 95 % of resampled seeds"
        report.figure(name, str(gap), each=gap.each, mean=gap.mean, low=gap.low, high=gap.high)
