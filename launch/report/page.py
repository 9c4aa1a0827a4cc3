"""The report's page: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from launch.progress import duration
from launch.report.birth_table import births_of
from launch.report.numbers import number
from launch.report.run_data import RunData

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def page(run: RunData, plots: Mapping[str, bytes]) -> str:
    """The page of a run; `plots` are PNG files by title, embedded as they are."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    state = run.summary.get("state", "still running, or ended without a summary")
    described = [str(run.options[key]) for key in ("method", "model", "data") if run.options.get(key)]
    versions = {f"{name} (version)": value for name, value in run.summary.get("versions", {}).items()}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.name,
        lead=" · ".join([state, *described]),
        facts=_facts(run),
        warnings=run.warnings,
        plots={title: base64.b64encode(png).decode() for title, png in plots.items()},
        changes=[
            _change(row, with_market=any(row.get("market") for row in run.changes)) for row in run.changes
        ],
        accuracy=_accuracy(run),
        births=births_of(run),
        options={**run.options, **versions},
    )


def _facts(run: RunData) -> dict[str, str]:
    summary, last = run.summary, run.metrics[-1]
    params, match = summary.get("trainable_params", {}), summary.get("match_params")
    matched = {} if match is None else {f"to match ({match['asked']})": f"{match['parameters']:,}"}
    return {
        "steps": f"{summary.get('steps', last['step']):,}",
        "final training loss": number(summary.get("final_loss", last["loss"]), ".4f"),
        "final validation loss": number(run.validation[-1]["loss"] if run.validation else None, ".4f"),
        **({"accuracy, mean of tasks": number(run.accuracy[-1]["average"], ".1%")} if run.accuracy else {}),
        "wall time": "–" if summary.get("wall_seconds") is None else duration(summary["wall_seconds"]),
        "tokens": number(summary.get("tokens"), ",d"),
        "tokens per second": number(summary.get("tokens_per_s", last["tokens_per_s"]), ",.0f"),
        "peak memory (GB)": number(summary.get("peak_mem_gb", last["peak_mem_gb"]), ".2f"),
        "trainable parameters": number(params.get("final"), ",.0f"),
        "the same, mean over steps": number(params.get("mean"), ",.0f"),
        **matched,
        "rank changes": str(len(run.changes)),
        "total rank": f"{last['total_rank']:,}",
        "steps skipped": str(sum(bool(row["skipped"]) for row in run.metrics)),
    }


def _accuracy(run: RunData) -> list[dict[str, str]]:
    """The table of accuracies: a row for each measurement, the tasks in the order in which they first appear."""
    tasks = list(dict.fromkeys(task for row in run.accuracy for task in row["accuracy"]))
    return [
        {
            "step": f"{row['step']:,}",
            **{task: number(row["accuracy"].get(task), ".1%") for task in tasks},
            "average": number(row["average"], ".1%"),
            "items": f"{row['items']:,}",
            "protocol": row["protocol"],
        }
        for row in run.accuracy
    ]


def _change(row: Mapping[str, Any], *, with_market: bool) -> dict[str, Any]:
    """A row of the table of rank changes; `numbers` by their column's heading."""
    return {
        "step": f"{row['step']:,}",
        "size": str(row["adjust_size"]),
        "pruned": list(Counter(row["pruned"]).items()),
        "expanded": list(Counter(row["expanded"]).items()),
        "numbers": {
            "margin": number(row["score_margin"], ".2g"),
            "age of pruned": ", ".join(str(age) for age in row["prune_age"]),
            "total rank": f"{row['total_rank']:,}",
            "parameters": f"{row['trainable_params']:,}",
            "loss before → after": (
                f"{number(row['loss_before'], '.4f')} → {number(row['loss_after'], '.4f')}"
            ),
            **({"market": _market(row)} if with_market else {}),
            "λ error": number(row["spectrum_error"], ".1%"),
            "seconds": number(row["seconds"], ".2f"),
        },
    }


def _market(row: Mapping[str, Any]) -> str:
    """What a change traded for what, or why it traded nothing; in units of the loss."""
    market = row.get("market")
    if not market:
        return "–"
    if row["pruned"] or row["expanded"]:
        gain, loss = number(market["expected_gain"], ".2g"), number(market["expected_loss"], ".2g")
        return f"expected gain {gain} for loss {loss}"
    gains = [value for value in market["gain"].values() if value is not None]
    losses = [value for value in market["loss"].values() if value is not None]
    best, cheapest = number(max(gains, default=None), ".2g"), number(min(losses, default=None), ".2g")
    return f"traded nothing: best gain {best} against cheapest loss {cheapest}"
