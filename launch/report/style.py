"""How the plots of a report look: colours, fonts, and a figure without a display."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flexlora_ds.terminal.plain_text import PLOT_TEXT

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, RED, TEAL = "#2b6cb0", "#dd6b20", "#c53030", "#2c7a7b"
STYLE = {
    **PLOT_TEXT,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
RANKS = LinearSegmentedColormap.from_list("ranks", ["#1a4e8a", "#7fb2df", "#f5f5f2", "#f2a65a", "#a83220"])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#1b998b", "#3d5a98", "#6a3d7c", "#c8553d"])
DPI = 150


def make_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, on a canvas of its own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
