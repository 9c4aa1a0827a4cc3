"""Medians of paired ratios and means of paired differences, with intervals by the bootstrap."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and the middle 95 % of the medians of resampled rounds."""

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def paired_ratio(values: Sequence[float], references: Sequence[float], seed: int = 0) -> Ratio:
    """Of value / reference, round by round: what disturbs a whole round disturbs both."""
    ratios = np.asarray(values, dtype=np.float64) / np.asarray(references, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    return Ratio(statistics.median(ratios.tolist()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and the middle 95 % of the means of resampled pairs."""

    each: tuple[float, ...]
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def paired_difference(values: Sequence[float], references: Sequence[float], seed: int = 0) -> Difference:
    """Of value − reference, pair by pair. Of three pairs the interval is as wide as their differences, no wider."""
    each = np.asarray(values, dtype=np.float64) - np.asarray(references, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(each), (RESAMPLES, len(each)))
    low, high = np.quantile(each[picks].mean(axis=1), (0.025, 0.975))
    return Difference(tuple(each.tolist()), float(each.mean()), float(low), float(high))
