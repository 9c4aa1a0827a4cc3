"""The report's page: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from launch.progress import duration
from launch.report.accuracy_table import accuracy_rows
from launch.report.birth_table import births_of
from launch.report.change_table import change_rows
from launch.report.cost import FLOPS, cost_table
from launch.report.history import history_of
from launch.report.layer_table import layer_table
from launch.report.numbers import number
from launch.report.run_data import RunData
from launch.report.spectrum_sample import HEIGHT, WIDTH, sample_spectra

MOST_WARNINGS = 50
"""Warnings shown; of the others, their number."""

RANKS = "Ranks"
"""The title of the heatmap, which the page shows where its script does not run."""


def page(run: RunData, plots: Mapping[str, bytes], beside: Sequence[RunData] = ()) -> str:
    """The page of a run.

    Args:
        run: the run, read from its folder.
        plots: PNG files by title, embedded as they are.
        beside: other runs, whose costs stand beside this run's.
    """
    state = run.summary.get("state", "still running, or ended without a summary")
    described = [str(run.options[key]) for key in ("method", "model", "data") if run.options.get(key)]
    versions = {f"{name} (version)": value for name, value in run.summary.get("versions", {}).items()}
    history = history_of(run)
    costs = cost_table([run, *beside])
    script = _text("history.js")
    return (
        _environment()
        .from_string(_text("page.html.jinja"))
        .render(
            name=run.name,
            lead=" · ".join([state, *described]),
            facts=_facts(run),
            warnings=run.warnings[:MOST_WARNINGS],
            more_warnings=max(0, len(run.warnings) - MOST_WARNINGS),
            plots={title: base64.b64encode(png).decode() for title, png in plots.items()},
            ranks_title=RANKS,
            history=history,
            layers=layer_table(history) if history and history.uniform_rank is None else None,
            spectra=sample_spectra(run),
            box=(WIDTH, HEIGHT),
            changes=change_rows(run),
            number_of_changes=len(run.changes),
            costs=costs,
            run_names=[one.name for one in (run, *beside)],
            formula=FLOPS if "FLOPs" in costs else "",
            accuracy=accuracy_rows(run.accuracy),
            births=births_of(run),
            options={**run.options, **versions},
            style=Markup(_text("page.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def breakable(name: object) -> Markup:
    """A dotted name that may go on in the next line after each dot."""
    return Markup(".<wbr>").join(escape(part) for part in str(name).split("."))


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    environment.policies["json.dumps_function"] = json.dumps
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _facts(run: RunData) -> dict[str, str]:
    summary, last = run.summary, run.metrics[-1]
    wall = summary.get("wall_seconds")
    return {
        "steps": f"{summary.get('steps', last['step']):,}",
        "final training loss": number(summary.get("final_loss", last["loss"]), ".4f"),
        "final validation loss": number(run.validation[-1]["loss"] if run.validation else None, ".4f"),
        **({"accuracy, mean of tasks": number(run.accuracy[-1]["average"], ".1%")} if run.accuracy else {}),
        "wall time": "–" if wall is None else duration(wall),
        "tokens per second": number(summary.get("tokens_per_s", last["tokens_per_s"]), ",.0f"),
        "peak memory (GB)": number(summary.get("peak_mem_gb", last["peak_mem_gb"]), ".2f"),
        "rank changes": f"{len(run.changes):,}",
        "total rank": f"{last['total_rank']:,}",
        "steps skipped": f"{sum(bool(row['skipped']) for row in run.metrics):,}",
    }
