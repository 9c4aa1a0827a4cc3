"""Which runs belong together: the learning rate that each setting chose, and its runs seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.learning.figures import figures
from benchmarks.learning.further import FURTHER
from benchmarks.learning.runs import Run, Runner

Figures = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """The figures of all runs, and what was compared."""

    settings: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[str]
    """Tried on the first seed; empty: the options' own."""
    chosen: dict[str, str | None]
    """The rate at which each setting ran on all seeds."""
    found: dict[Run, Figures]
    reference: str | None
    """The setting that the others are compared with."""

    def rows(self, setting: str) -> list[Figures]:
        """The figures at the chosen rate, seed by seed."""
        return [self.found[Run(setting, seed, self.chosen[setting])] for seed in self.seeds]

    def references(self, setting: str) -> list[Figures | None]:
        """Those of the reference at the rate that `setting` chose, where it ran at it."""
        assert self.reference is not None
        rate = self.chosen[setting]
        return [self.found.get(Run(self.reference, seed, rate)) for seed in self.seeds]


def compare(
    runner: Runner,
    settings: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[str],
    reference: str | None,
    read: Callable[..., Figures] = figures,
) -> Comparison:
    """Train what has not been trained, and read all.

    With `rates` every setting runs at each of them on the first seed. The other seeds run at the best (`best_rate`).
    Runs of the reference at other settings' rates are read where they exist; none is trained for that.

    Raises:
        RunError, UserError: as `Runner.train`.
    """
    first = [Run(setting, seeds[0], rate) for setting in settings for rate in rates or [None]]
    found = {run: read(folder) for run, folder in runner.train_all(first).items()}
    chosen = {setting: best_rate(found, setting) for setting in settings}
    others = [Run(setting, seed, chosen[setting]) for seed in seeds[1:] for setting in settings]
    found |= {run: read(folder) for run, folder in runner.train_all(others).items()}
    if reference is not None:
        beside = {Run(reference, seed, rate) for seed in seeds for rate in chosen.values()}
        there = [run for run in sorted(beside, key=str) if run not in found and runner.finished(run)]
        found |= {run: read(folder) for run, folder in runner.train_all(there).items()}
    return Comparison(settings, seeds, rates, chosen, found, reference)


def best_rate(found: dict[Run, Figures], setting: str) -> str | None:
    """The rate of the lowest loss by `criterion`; of equal ones the first."""
    key = criterion(found)
    tried = {run: row[key] for run, row in found.items() if run.setting == setting}
    return min(tried, key=lambda run: tried[run]).rate


def criterion(found: dict[Run, Figures]) -> str:
    """The figure that rates are chosen by: the loss on further records where all have it, else the last validation."""
    return FURTHER if all(FURTHER in row for row in found.values()) else "val, end"
