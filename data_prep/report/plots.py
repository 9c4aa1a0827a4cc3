"""The report's pictures, drawn without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.report.measure import Measures
from flexlora_ds.terminal.plain_text import PLOT_TEXT, printable

_COLOURS = ("#3b6ea5", "#e08e45", "#5a9367", "#b0455a", "#8a7cb4")


def plot_all(measures: Mapping[str, Measures], folder: Path, unit: str, cutoff: int) -> list[Path]:
    """Write lengths.png, answers.png and overlaps.png; returns their paths."""
    tasks: dict[str, dict[str, Measures]] = {}
    for name, found in measures.items():
        task, _, kind = name.rpartition("/")
        if task:
            tasks.setdefault(task, {})[kind.removesuffix(".json")] = found
    with rc_context(PLOT_TEXT):
        figures = {
            "lengths.png": _lengths(tasks, unit, cutoff),
            "answers.png": _answers(tasks),
            "overlaps.png": _overlaps(tasks),
        }
        for file, figure in figures.items():
            figure.savefig(folder / file, dpi=110)
    return [folder / file for file in figures]


def _figure(height: float) -> Figure:
    return Figure(figsize=(9.0, height), layout="constrained")


def _lengths(tasks: Mapping[str, Mapping[str, Measures]], unit: str, cutoff: int) -> Figure:
    figure = _figure(1.2 + 0.55 * len(tasks))
    axes: Axes = figure.subplots()
    labels, rows = [], []
    for task, kinds in tasks.items():
        for kind, found in kinds.items():
            labels.append(printable(f"{task} {kind}"))
            rows.append(found.lengths)
    axes.boxplot(rows, orientation="horizontal", whis=(0, 95), showfliers=False, widths=0.7)
    axes.set_yticks(range(1, len(labels) + 1), labels)
    axes.invert_yaxis()
    axes.axvline(cutoff, color=_COLOURS[3], linestyle="--", label=f"cutoff {cutoff}")
    axes.set_xlabel(f"{unit} per training text (box: quartiles; whiskers: shortest, 95th percentile)")
    axes.set_title("Lengths")
    axes.legend(loc="lower right")
    return figure


def _answers(tasks: Mapping[str, Mapping[str, Measures]]) -> Figure:
    figure = _figure(1.2 + 0.55 * len(tasks))
    axes: Axes = figure.subplots()
    labels: list[str] = []
    for task, kinds in tasks.items():
        for kind, found in kinds.items():
            left = 0.0
            for index, (answer, number) in enumerate(sorted(found.answers.items())[:20]):
                share = number / found.records
                colour = _COLOURS[index % len(_COLOURS)]
                axes.barh(len(labels), share, left=left, color=colour, edgecolor="white")
                if share > 0.08:
                    axes.text(
                        left + share / 2,
                        len(labels),
                        printable(answer),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white",
                    )
                left += share
            labels.append(printable(f"{task} {kind}"))
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of records")
    axes.set_title("Right answers")
    return figure


def _overlaps(tasks: Mapping[str, Mapping[str, Measures]]) -> Figure:
    tests = {task: kinds["test"] for task, kinds in tasks.items() if "test" in kinds}
    figure = _figure(1.4 + 0.4 * len(tests))
    axes: Axes = figure.subplots()
    for shift, field, label in ((-0.2, "overlap", "exact"), (0.2, "overlap_normalised", "normalised")):
        shares = [100 * (getattr(found, field) or 0) / found.records for found in tests.values()]
        bars = axes.barh(
            [index + shift for index in range(len(tests))],
            shares,
            height=0.38,
            color=_COLOURS[shift > 0],
            label=label,
        )
        axes.bar_label(bars, [f"{share:.2f} %" for share in shares], fontsize=7, padding=2)
    axes.set_yticks(range(len(tests)), [printable(task) for task in tests])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 1.2 * axes.get_xlim()[1]))
    axes.set_xlabel("test instructions that occur in training, %")
    axes.set_title("Overlap of train and test")
    axes.legend(loc="lower right")
    return figure
