"""`python -m eval.compare DIR DIR …`: one table of several evaluations, with differences to the first.

A setting is `DIR`, or `NAME=DIR,DIR,…` for several seeds, which are averaged. Directories that
differ only in the number after `seed` in the adapter's path count as seeds of one setting by themselves.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.compare.differences import Difference, Run, Setting, agreement, common_tasks, difference, read_run
from eval.compare.paper import PAPER
from flexlora_ds.errors import UserError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.home import at_home
from flexlora_ds.terminal.command import CommandParser, run_parsed
from flexlora_ds.terminal.plain_text import PLOT_TEXT, legend_label, markdown_text

_SEED = re.compile(r"seed[-_=]?\d+")
_MAY_DIFFER = {"adapter", "adapter_files", "batch_size", "batch_tokens", "processes", "threads", "device"}


def read_settings(arguments: Sequence[str]) -> list[Setting]:
    """The settings in the order given. UserError where a folder is no finished evaluation, or names clash."""
    settings: list[Setting] = []
    for argument in arguments:
        whole = Path(argument).is_dir()  # a folder's own name may hold the signs of a list
        name, named, folders = (
            argument.partition("=") if "=" in argument and not whole else ("", "", argument)
        )
        if named and not (name.strip() and all(map(str.strip, folders.split(",")))):
            raise UserError(f"no name or no folder in {argument!r}", mend="write NAME=DIR or NAME=DIR,DIR")
        runs = [read_run(Path(at_home(folder))) for folder in ([argument] if whole else folders.split(","))]
        if named:
            settings.append(Setting(name, tuple(runs)))
            continue
        for run in runs:
            _add_run(settings, run)
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two settings are called {name!r}", mend="name them: A=DIR B=DIR")
    for setting in settings:
        if len({run.folder.resolve() for run in setting.runs}) < len(setting.runs):
            raise UserError(f"{setting.name!r} has one evaluation twice", mend="give a folder for each seed")
    return settings


def _add_run(settings: list[Setting], run: Run) -> None:
    """Add a run to the setting whose other seeds are there, or as a new setting."""
    adapter = run.summary.get("adapter") or ""
    for index, setting in enumerate(settings):
        if _SEED.search(adapter) and _identity(setting.runs[0]) == _identity(run):
            settings[index] = Setting(setting.name, (*setting.runs, run))
            return
    settings.append(Setting(run.folder.name if run.folder.name else str(run.folder), (run,)))


def _identity(run: Run) -> dict[str, Any]:
    same = {key: value for key, value in run.summary["settings"].items() if key not in _MAY_DIFFER}
    return same | {"adapter": _SEED.sub("seed*", run.summary.get("adapter") or "")}


def report(settings: Sequence[Setting], paper: bool, beside: Sequence[Setting] = ()) -> str:
    """The comparison as Markdown; the settings `beside` have a column of their own, without differences."""
    tasks = common_tasks([*settings, *beside])
    rows = []
    for task in [*tasks, "average"]:
        chosen = tasks if task == "average" else [task]
        cells = [f"**{task}**" if task == "average" else task]
        for setting in settings:
            cells.append(_accuracy(setting, chosen))
            if setting is not settings[0]:
                cells.append(_interval(difference(settings[0], setting, chosen)))
        rows.append((*cells, *(_accuracy(setting, chosen) for setting in beside)))

    def unanswered(setting: Setting) -> str:
        return f"{sum(setting.unanswered(task) for task in tasks):g}"

    rows.append(("unanswered", *_per_setting(settings, unanswered), *map(unanswered, beside)))
    if len(settings) > 1:
        first = settings[0]
        agreements = _per_setting(settings, lambda s: _percent(agreement(first, s, tasks)))
        rows.append(("agreement %", *agreements, *("" for _ in beside)))
    header = ["accuracy %"]
    for setting in settings:
        named = markdown_text(setting.name)
        header += [named] if setting is settings[0] else [named, f"− {markdown_text(settings[0].name)}"]
    header += [markdown_text(setting.name) for setting in beside]
    text = "# Comparison\n\n" + markdown_table(tuple(header), rows) + "\n" + _notes(settings, beside, tasks)
    return text + (_paper_rows(tasks) if paper else "")


def _per_setting(settings: Sequence[Setting], cell: Any) -> list[str]:
    cells: list[str] = []
    for setting in settings:
        cells += [cell(setting)] if setting is settings[0] else [cell(setting), ""]
    return cells


def _accuracy(setting: Setting, tasks: Sequence[str]) -> str:
    mean = sum(setting.accuracy(task) for task in tasks) / len(tasks)
    spread = setting.spread(tasks)
    return f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _interval(value: Difference) -> str:
    mark = " *" if value.excludes_zero else ""
    return f"{100 * value.value:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]{mark}"


def _percent(value: float) -> str:
    return "none answered" if math.isnan(value) else f"{100 * value:.1f}"


def _notes(settings: Sequence[Setting], beside: Sequence[Setting], tasks: Sequence[str]) -> str:
    lines = [
        "Differences: 95 % intervals of the paired bootstrap over items (10,000 draws); * excludes zero."
    ]
    lines.append("Agreement with the first: same prediction, of the items that either answered.")
    shown = [*settings, *beside]
    if any(len(setting.runs) > 1 for setting in shown):
        lines.append("±: standard deviation over seeds. The intervals hold for these seeds.")
    for setting in shown:
        for run in setting.runs:
            lines.append(f"{markdown_text(setting.name)}: {_subject(run)}")
    protocols = {run.summary["protocol"] for setting in settings for run in setting.runs}
    if len(protocols) > 1:
        lines.append(
            f"**Of different protocols ({', '.join(sorted(protocols))}): not comparable as they stand.**"
        )
    if beside:
        lines.append(
            f"Beside the others, without a difference: {', '.join(markdown_text(s.name) for s in beside)}."
        )
    if len(tasks) < max(len(run.predictions) for setting in shown for run in setting.runs):
        lines.append(f"Only the tasks that all have: {', '.join(tasks)}.")
    return "".join(f"* {line}\n" for line in lines)


def _subject(run: Run) -> str:
    summary, settings = run.summary, run.summary["settings"]
    adapter = f" + {summary['adapter']}" if summary.get("adapter") else ""
    how = f"`{summary['protocol']}`, prompt `{settings['prompt']}`, {settings['dtype']}"
    return f"{how}, " + markdown_text(f"{summary['model']}{adapter} ({run.folder})")


def _paper_rows(tasks: Sequence[str]) -> str:
    rows = [
        (name, parameters, *(f"{row[task]:.1f}" for task in tasks), f"{row['average']:.1f}")
        for name, parameters, row in PAPER
    ]
    cited = "\nAs published by the paper for LLaMA3-8B (Table 2; cited, not measured here):\n\n"
    return cited + markdown_table(("cited", "parameters", *tasks, "average of eight"), rows)


def draw(settings: Sequence[Setting], path: Path) -> bool:
    """A bar chart of the accuracies; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    with matplotlib.rc_context(PLOT_TEXT):
        _draw(settings, path)
    return True


def _draw(settings: Sequence[Setting], path: Path) -> None:
    from matplotlib import pyplot

    tasks = common_tasks(settings)
    names = [*tasks, "average"]
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(settings)
    for index, setting in enumerate(settings):
        values = [100 * setting.accuracy(task) for task in tasks]
        values.append(sum(values) / len(values))
        places = [place + index * width for place in range(len(names))]
        axes.bar(places, values, width, label=legend_label(setting.name))
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, rotation=20)
    axes.set_ylabel("accuracy %")
    axes.set_ylim(0, 100)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(settings), 4), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for what the user must change, 1 for what failed."""
    parser = CommandParser("python -m eval.compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="DIR", help="an evaluation's folder, or NAME=DIR,DIR for seeds"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="DIR",
        default=[],
        help="evaluations shown without differences, such as one by another protocol",
    )
    parser.add_argument("--paper", action="store_true", help="add the paper's rows, marked as cited")
    parser.add_argument(
        "--out", default=".", help="where comparison.md and comparison.png go (default: here)"
    )
    return run_parsed(parser, _run, argv)


def _run(given: argparse.Namespace) -> None:
    settings = read_settings(given.runs)
    beside = read_settings(given.beside)
    text, out = report(settings, given.paper, beside), Path(given.out)
    write_text_atomically(out / "comparison.md", text)
    drawn = draw([*settings, *beside], out / "comparison.png")
    chart = f", {out}/comparison.png" if drawn else " (no chart without matplotlib)"
    print(f"{text}\n{out}/comparison.md{chart}")


if __name__ == "__main__":
    sys.exit(main())
