"""The curves as a picture: means over the seeds as lines, each seed as a dot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.sizes.curves import CURVES, TRAINED, TRUNCATED, Point


def draw(points: Sequence[Point], path: Path) -> None:
    """Validation loss over parameters, as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(CURVES):
        # What was trained at full size belongs to both curves of that setting.
        shown = [p for p in points if p.curve == curve or (curve == TRAINED and _whole(p))]
        sizes = sorted({p.fraction for p in shown})
        groups = [[p for p in shown if p.fraction == size] for size in sizes]
        color = f"C{number}"
        x = [np.mean([p.parameters for p in group]) / 1e6 for group in groups]
        axes.plot(x, [np.mean([p.loss for p in group]) for group in groups], color=color, label=curve)
        axes.scatter(
            [p.parameters / 1e6 for p in shown], [p.loss for p in shown], s=10, color=color, alpha=0.5
        )
    axes.set_xlabel("parameters, million")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _whole(point: Point) -> bool:
    return point.curve == TRUNCATED and point.fraction == 1
