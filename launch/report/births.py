"""The plot of new directions: how |λ| of each grew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from launch.report.run_data import RunData
from launch.report.style import DEPTH, DPI, STYLE, make_figure
from launch.run_folder.new_directions import NewDirection

MOST_LINES = 2000
"""Faint lines at most, spread evenly over the births; medians are of all."""

Point = tuple[float, float]


def draw_births(run: RunData, path: Path) -> None:
    """Draw |λ| of every direction born at a rank change over the steps, and the median of each change, bold."""
    last = run.metrics[-1]["step"]
    steps = sorted({story.born for story in run.births})
    norm = Normalize(steps[0], max(steps[-1], steps[0] + 1))
    with matplotlib.rc_context(STYLE):
        figure = make_figure(9.5, 4.4)
        axes = figure.add_subplot()
        lines = {id(story): line_of(story, last) for story in run.births}
        for story in run.births[:: 1 + len(run.births) // MOST_LINES]:
            _draw_line(axes, lines[id(story)], DEPTH(norm(story.born)))
        for step in steps:
            medians = medians_of([lines[id(story)] for story in run.births if story.born == step])
            axes.plot(*zip(*medians, strict=True), color=DEPTH(norm(step)), linewidth=2.2, zorder=3)
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
        axes.set(
            title=f"{run.name}: |λ| of new directions (bold: median of a change's that live)",
            xlabel="step",
            ylabel="|λ|",
        )
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if len(steps) > 1:
            bar = figure.colorbar(ScalarMappable(norm, DEPTH), ax=axes, pad=0.02, aspect=28)
            bar.outline.set_visible(False)
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar.set_label("born at step")
        figure.savefig(path, dpi=DPI)


def line_of(story: NewDirection, last: int) -> list[Point]:
    """(step, |λ|) from the birth on; `last`: the run's last step, to which λ at the end belongs."""
    points = [(step, abs(value)) for step, value in story.lam if value is not None]
    end = [] if story.lam_end is None else [(last, abs(story.lam_end))]
    return [(story.born, 0.0), *points, *end]


def medians_of(lines: list[list[Point]]) -> list[Point]:
    """At each step, the median over the directions that are seen there."""
    seen: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line:
            seen.setdefault(step, []).append(value)
    return [(step, float(np.median(values))) for step, values in sorted(seen.items())]


def _draw_line(axes: Any, line: list[Point], colour: Any) -> None:
    axes.add_collection(LineCollection([line], colors=[colour], linewidths=0.6, alpha=0.3))
