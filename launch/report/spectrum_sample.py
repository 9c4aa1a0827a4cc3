"""The singular values of ten matrices: the paper's Figure 3."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexlora_ds.importance import spectral_entropy
from launch.report.numbers import number
from launch.report.run_data import RunData

SAMPLE = 10
"""Matrices shown, as many as in the paper."""

MOST_BARS = 128
"""Directions shown of one matrix: those of the largest |λ|."""

WIDTH, HEIGHT = 180, 84
"""Of one plot, in units of its view box."""


@dataclass(frozen=True)
class Bar:
    """A direction's |λ| as a rectangle, in units of the view box."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class SampledSpectrum:
    """One matrix of the sample."""

    name: str
    rank: int
    entropy: str
    strength: str
    """‖λ‖, the root of the sum of squares."""
    largest: str
    """The largest |λ|."""
    bars: list[Bar]
    """In falling order; the tallest of the whole sample fills the height."""


def sample_spectra(run: RunData) -> list[SampledSpectrum]:
    """Ten matrices drawn by a fixed seed, in the model's order; those whose λ are not all finite are none of them."""
    sound = {
        name: values for name, values in run.spectra.items() if values and all(map(math.isfinite, values))
    }
    drawn = set(random.Random(0).sample(list(sound), min(SAMPLE, len(sound))))
    chosen = {name: sorted(map(abs, values), reverse=True) for name, values in sound.items() if name in drawn}
    tallest = max((values[0] for values in chosen.values()), default=0.0)
    return [_spectrum(name, values, tallest) for name, values in chosen.items()]


def _spectrum(name: str, values: Sequence[float], tallest: float) -> SampledSpectrum:
    entropy = spectral_entropy(torch.tensor(values, dtype=torch.float64)) if len(values) > 1 else None
    return SampledSpectrum(
        name,
        len(values),
        number(entropy, ".3f"),
        number(math.hypot(*values), ".3g"),
        number(values[0], ".3g"),
        _bars(values[:MOST_BARS], tallest),
    )


def _bars(values: Sequence[float], tallest: float) -> list[Bar]:
    slot = WIDTH / max(8, len(values))
    heights = [HEIGHT * (value / tallest if tallest else 0.0) for value in values]
    return [
        Bar(round(place * slot, 2), round(HEIGHT - height, 2), round(slot * 0.8, 2), round(height, 2))
        for place, height in enumerate(heights)
    ]
