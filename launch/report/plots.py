"""Plots of losses, ranks and singular values, drawn with matplotlib's Agg canvas: no display, no global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from flexlora_ds.rounding import ceil_div
from launch.report.run_data import OTHERS, RunData, group_by_kind, layer_label
from launch.report.style import BLUE, DEPTH, DPI, INK, MUTED, ORANGE, RANKS, RED, STYLE, TEAL, make_figure

_POINTS: dict[str, Any] = {
    "color": RED,
    "marker": "o",
    "markersize": 4.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.7,
    "linewidth": 1,
    "zorder": 4,
}
_MAX_COLUMNS = 7
_LABELLED_ROWS = 48  # up to here the rows of a heatmap stay readable one by one


def draw_loss(run: RunData, path: Path) -> None:
    """Draw the training loss, raw and smoothed, the validation points and the rank changes over the steps."""
    with matplotlib.rc_context(STYLE):
        figure = make_figure(9.5, 5.2 if run.changes else 4.4)
        grid = figure.add_gridspec(2 if run.changes else 1, 1, height_ratios=[5, 1] if run.changes else [1])
        axes = figure.add_subplot(grid[0])
        _draw_losses(axes, run)
        if run.changes:
            _draw_moves(figure.add_subplot(grid[1], sharex=axes), run)
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("step")
        figure.savefig(path, dpi=DPI)


def draw_rank_heatmap(run: RunData, path: Path) -> None:
    """Draw every matrix's rank after every change, one panel per module kind, one row per layer."""
    steps, history = run.rank_history()
    kinds = group_by_kind(history)
    everything = np.asarray(list(history.values()))
    start = int(np.median(everything[:, 0]))
    spread = max(1, int(np.abs(everything - start).max()))
    norm = TwoSlopeNorm(start, vmin=max(min(1, start - 1), start - spread), vmax=start + spread)
    rows = max(len(names) for names in kinds.values())
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        lines, columns = _grid_of(len(kinds))
        names_width = 1.8 if OTHERS in kinds else 0.0
        height = 1.1 + lines * (0.75 + max(1.2, min(rows, 64) * 0.185))
        figure = make_figure(max(7.0, 1.9 + _panel_width(columns) * columns + names_width), height)
        panels = figure.subplots(lines, columns, squeeze=False)
        for panel, (kind, names) in zip(panels.flat, kinds.items(), strict=False):
            values = np.asarray([history[name] for name in names])
            panel.imshow(values, cmap=RANKS, norm=norm, aspect="auto", interpolation="nearest")
            _dress_heatmap(panel, values, steps, [_tail(layer_label(name, kind), 48) for name in names])
            panel.set_title(f"{_tail(kind)}  Σ {values[:, 0].sum()} → {values[:, -1].sum()}", fontsize=10)
        _hide_rest(panels, len(kinds))
        _add_colour_bar(figure, panels, ScalarMappable(norm, RANKS), f"rank (pale: {start}, as at the start)")
        _label(
            figure,
            f"{run.name}: ranks of {len(history)} matrices over {len(steps) - 1} changes "
            "(right of each row: rank at the end)",
            x="step of the change (0: start)",
            y="layer",
        )
        figure.savefig(path, dpi=DPI)


def draw_singular_values(run: RunData, path: Path) -> None:
    """Draw each matrix's |λ| at the end in falling order, one panel per module kind, coloured by layer."""
    kinds = group_by_kind(run.spectra)
    with matplotlib.rc_context(STYLE):
        lines, columns = _grid_of(len(kinds))
        figure = make_figure(max(7.0, 1.6 + _panel_width(columns) * columns), 1.0 + 3.1 * lines)
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
        norm = Normalize(0, max(1, max(len(names) for names in kinds.values()) - 1))
        for panel, (kind, names) in zip(panels.flat, kinds.items(), strict=False):
            for depth, name in enumerate(names):
                values = np.sort(np.abs(run.spectra[name]))[::-1]
                colour = DEPTH(norm(depth))
                places = np.arange(1, len(values) + 1)
                panel.plot(places, values, "o-", color=colour, linewidth=1, markersize=2.6, alpha=0.75)
            panel.set_title(_tail(kind), fontsize=10)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
            panel.set_xlim(left=0.5)
        panels[0, 0].set_ylim(bottom=0)
        _hide_rest(panels, len(kinds))
        _add_colour_bar(figure, panels, ScalarMappable(norm, DEPTH), "layer")
        _label(
            figure,
            f"{run.name}: strength |λ| of the directions of each matrix at the end",
            x="direction, strongest first",
            y="|λ|",
        )
        figure.savefig(path, dpi=DPI)


def smooth(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """The mean over a centred thirtieth of the points: it does not lag.

    Towards the start the window narrows, so that the steep fall there stays steep; at the end it is shortened.
    """
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(count)
    half = np.minimum(max(1, count // 60), places // 2)
    first, last = places - half, np.minimum(places + half + 1, count)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _tail(name: str, longest: int = 28) -> str:
    """The end of a name, which tells it from others, so that a plot keeps room for itself."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _grid_of(panels: int) -> tuple[int, int]:
    lines = ceil_div(panels, _MAX_COLUMNS)
    return lines, ceil_div(panels, lines)


def _panel_width(columns: int) -> float:
    return 2.35 if columns <= 5 else 2.0


def _hide_rest(panels: Any, used: int) -> None:
    for panel in panels.flat[used:]:
        panel.set_visible(False)


def _add_colour_bar(figure: Figure, panels: Any, colours: ScalarMappable, label: str) -> None:
    bar = figure.colorbar(colours, ax=panels, fraction=0.035, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    bar.set_label(label)


def _label(figure: Figure, title: str, *, x: str, y: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def _draw_losses(axes: Any, run: RunData) -> None:
    rows = [row for row in run.metrics if row["loss"] is not None]
    points = [row for row in run.validation if row["loss"] is not None]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    for number, change in enumerate(run.changes):
        label = "_" if number else f"{len(run.changes)} rank changes"
        axes.axvline(change["step"], color=ORANGE, linewidth=0.8, alpha=0.5, zorder=1, label=label)
    axes.plot(steps, losses, color=BLUE, linewidth=0.8, alpha=0.35, label="training")
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=2.2, label="training, smoothed")
    axes.plot([row["step"] for row in points], [row["loss"] for row in points], label="validation", **_POINTS)
    skipped = [row["step"] for row in run.metrics if row["skipped"]]
    if skipped:
        floor = axes.get_xaxis_transform()  # x in steps, y as a share of the height
        axes.plot(skipped, [0.02] * len(skipped), "x", color=INK, transform=floor, label="skipped steps")
    _scale_losses(axes, losses + [row["loss"] for row in points])
    axes.set(title=f"{run.name}: loss per target token", ylabel="loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="upper right", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")


def _scale_losses(axes: Any, losses: list[float]) -> None:
    """A logarithmic axis where the loss falls far: else all but the first steps would be one flat line."""
    positive = [loss for loss in losses if loss > 0]
    if not positive or max(positive) < 6 * min(positive):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_moves(axes: Any, run: RunData) -> None:
    steps = [row["step"] for row in run.changes]
    width = 0.55 * min(np.diff(steps), default=max(1, run.metrics[-1]["step"]) / 20)
    axes.bar(steps, [len(row["expanded"]) for row in run.changes], width, color=TEAL)
    axes.bar(steps, [-len(row["pruned"]) for row in run.changes], width, color=RED, alpha=0.75)
    axes.axhline(0, color=MUTED, linewidth=0.6)
    most = max(1, *(max(len(row["expanded"]), len(row["pruned"])) for row in run.changes))
    axes.set(ylim=(-most * 1.25, most * 1.25), yticks=[-most, 0, most], xlabel="step")
    axes.set_yticklabels([f"−{most}", "0", f"+{most}"])
    axes.set_ylabel("directions", fontsize=9)
    axes.grid(axis="x", visible=False)


def _dress_heatmap(panel: Any, values: npt.NDArray[np.int64], steps: list[int], labels: list[str]) -> None:
    rows, columns = values.shape
    for spine in panel.spines.values():
        spine.set_visible(False)
    every = max(1, math.ceil(columns / 5))
    ticks = list(range(0, columns, every))
    panel.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks], fontsize=8, rotation=45, ha="right")
    label_every = max(1, math.ceil(rows / 34))
    panel.set_yticks(range(0, rows, label_every), labels[::label_every], fontsize=7.5)
    panel.tick_params(length=0, pad=2)
    panel.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.8)
    if rows <= _LABELLED_ROWS:
        beside = panel.get_yaxis_transform()  # x as a share of the width, y in rows
        for row in range(rows):
            colour = INK if values[row, -1] != values[row, 0] else "#b8c0c8"
            text = str(values[row, -1])
            panel.text(1.015, row, text, va="center", fontsize=7, color=colour, transform=beside)
