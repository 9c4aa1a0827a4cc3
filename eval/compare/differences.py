"""Comparing evaluations item by item: differences with paired bootstrap intervals, and agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.tasks import TASKS
from eval.predictions import Prediction, PredictionFolder
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_json_object

RESAMPLES = 10_000
_AGAIN = "remove it and evaluate again"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One evaluation: its results.json and its predictions, `predictions[task]` in the order of the items."""

    folder: Path
    summary: Mapping[str, Any]
    predictions: Mapping[str, tuple[Prediction, ...]]

    def correct(self, task: str) -> Floats:
        """1 where an item is right, else 0: float64 [items]."""
        return np.array([p.correct for p in self.predictions[task]], dtype=np.float64)


@dataclass(frozen=True)
class Setting:
    """The runs of one setting: one, or several that differ in their seed and are averaged."""

    name: str
    runs: tuple[Run, ...]

    def accuracy(self, task: str) -> float:
        """The mean accuracy over the runs, a fraction."""
        return float(np.mean([run.correct(task).mean() for run in self.runs]))

    def spread(self, tasks: Sequence[str]) -> float | None:
        """Standard deviation over the runs of the mean accuracy over `tasks`; None for a single run."""
        if len(self.runs) < 2:
            return None
        means = [np.mean([run.correct(task).mean() for task in tasks]) for run in self.runs]
        return float(np.std(means, ddof=1))

    def item_means(self, task: str) -> Floats:
        """How often each item is right over the runs: float64 [items] in [0, 1]."""
        return np.asarray(np.mean([run.correct(task) for run in self.runs], axis=0), dtype=np.float64)

    def unanswered(self, task: str) -> float:
        """The mean number of unanswered items."""
        return float(np.mean([sum(p.prediction is None for p in run.predictions[task]) for run in self.runs]))


@dataclass(frozen=True)
class Difference:
    """A setting's accuracy minus the first one's, with the paired bootstrap's 95 % interval over items."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain zero."""
        return self.low > 0 or self.high < 0


def read_run(folder: Path) -> Run:
    """Read a finished evaluation. UserError where it is unfinished or something else."""
    path = folder / "results.json"
    if not path.exists():
        raise UserError(f"no results.json in {folder}", mend=f"finish it with python -m eval --out {folder}")
    summary = read_json_object(path, _AGAIN)
    fault = _fault(summary)
    if fault:
        raise UserError(f"not an evaluation's results: {fault}", str(path), _AGAIN)
    reader = PredictionFolder(folder)
    totals = {task: figures["total"] for task, figures in summary["tasks"].items()}
    predictions = {task: tuple(p for _, p in sorted(reader.read(task).items())) for task in totals}
    for task, found in predictions.items():
        if len(found) != totals[task]:
            raise UserError(
                f"{folder}/predictions/{task}.jsonl holds {len(found)} of {totals[task]} items",
                mend="run the evaluation again to complete it",
            )
    return Run(folder, summary, predictions)


def _fault(summary: Mapping[str, Any]) -> str | None:
    """What a comparison needs of results.json and does not find there; None where all is well."""
    settings, tasks = summary.get("settings"), summary.get("tasks")
    if not isinstance(settings, dict) or not isinstance(tasks, dict) or not tasks:
        return "no settings or no tasks"
    texts = {key: summary.get(key) for key in ("model", "protocol")} | {
        key: settings.get(key) for key in ("prompt", "dtype")
    }
    for key, value in texts.items():
        if not isinstance(value, str):
            return f"{key} is no text"
    if not isinstance(summary.get("adapter"), (str, type(None))):
        return "adapter is no text"
    for task, figures in tasks.items():
        if task not in TASKS:
            return f"no task is called {task[:40]!r}"
        total = figures.get("total") if isinstance(figures, dict) else None
        if type(total) is not int or not 1 <= total < 1 << 53:
            return f"{task} has no total"
    return None


def common_tasks(settings: Sequence[Setting]) -> list[str]:
    """The tasks that all runs have, over the same items. UserError where there is none, or items differ."""
    runs = [run for setting in settings for run in setting.runs]
    tasks = [task for task in runs[0].predictions if all(task in run.predictions for run in runs)]
    if not tasks:
        raise UserError(
            f"{runs[0].folder} and the others have no task in common", mend="evaluate them on the same tasks"
        )
    for task in tasks:
        wanted = [(p.index, p.answer) for p in runs[0].predictions[task]]
        for run in runs[1:]:
            if [(p.index, p.answer) for p in run.predictions[task]] != wanted:
                raise UserError(
                    f"{run.folder} and {runs[0].folder} were asked different items of {task}",
                    mend="evaluate both on the same data and --limit",
                )
    return tasks


def difference(first: Setting, second: Setting, tasks: Sequence[str], seed: int = 0) -> Difference:
    """The difference of the unweighted mean over `tasks`; items are resampled within each task, in pairs.

    Differences per item take few values. So their counts are drawn (multinomial) instead of the items. That is the
    same distribution as resampling items (Efron & Tibshirani 1993, percentile interval), and much faster.
    """
    rng = np.random.default_rng(seed)
    value, draws = 0.0, np.zeros(RESAMPLES)
    for task in tasks:
        per_item = second.item_means(task) - first.item_means(task)
        values, counts = np.unique(per_item, return_counts=True)
        value += float(per_item.mean()) / len(tasks)
        draws += (
            rng.multinomial(len(per_item), counts / len(per_item), RESAMPLES)
            @ values
            / len(per_item)
            / len(tasks)
        )
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(value, float(low), float(high))


def agreement(first: Setting, second: Setting, tasks: Sequence[str]) -> float:
    """The share of items with the same prediction, of those that either answered; mean over pairs of runs.

    NaN where neither answered anything.
    """
    shares = []
    for one in first.runs:
        for other in second.runs:
            pairs = [
                (a.prediction, b.prediction)
                for task in tasks
                for a, b in zip(one.predictions[task], other.predictions[task], strict=True)
                if a.prediction is not None or b.prediction is not None
            ]
            shares.append(sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan)
    return float(np.mean(shares))
