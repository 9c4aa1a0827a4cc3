"""What a run cost: time, memory, operations, speed, as the paper's Table 13 puts methods side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from launch.progress import duration
from launch.report.numbers import number
from launch.report.run_data import RunData

FLOPS = (
    "FLOPs are tokens × (4 × frozen weights + 6 × trainable weights, mean over the steps). A frozen weight costs "
    "2 operations forward and 2 backward; a trainable one 2 more for its own gradient. Embeddings, the frozen head, "
    "attention scores and what checkpointing recomputes are not counted."
)
"""The formula of `flops_of`, as the page states it."""


def cost_table(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """By the heading of its row, one cell a run; a row that no run can fill is left out."""
    costs = [_cost(run) for run in runs]
    rows = {label: [cost[label] for cost in costs] for label in costs[0]}
    return {label: cells for label, cells in rows.items() if set(cells) != {"–"}}


def flops_of(run: RunData) -> float | None:
    """Floating-point operations of the run's training steps; None where its summary does not tell the weights."""
    tokens, frozen = run.summary.get("tokens"), run.summary.get("frozen_params")
    trainable = run.summary.get("trainable_params", {}).get("mean")
    if tokens is None or frozen is None or trainable is None:
        return None
    return float(tokens * (4.0 * frozen + 6.0 * trainable))


def _cost(run: RunData) -> dict[str, str]:
    summary, last = run.summary, run.metrics[-1]
    parameters = summary.get("trainable_params", {})
    wall = summary.get("wall_seconds")
    step = [row["step_s"] for row in run.metrics if row["step_s"] is not None]
    return {
        "method": str(run.options.get("method", "–")),
        "steps": f"{summary.get('steps', last['step']):,}",
        "training time": "–" if wall is None else duration(wall),
        "of it in rank changes": _in_changes(run, wall),
        "seconds a step, median": number(statistics.median(step) if step else None, ".3g"),
        "memory, peak of process 0 (GB)": number(summary.get("peak_mem_gb", last["peak_mem_gb"]), ".2f"),
        "FLOPs": number(flops_of(run), ".3g"),
        "tokens": f"{summary.get('tokens', last['tokens']):,}",
        "tokens per second": number(summary.get("tokens_per_s", last["tokens_per_s"]), ",.0f"),
        "trainable parameters at the end": number(parameters.get("final"), ",.0f"),
        "the same, mean over steps": number(parameters.get("mean"), ",.0f"),
        "parameters to match": _to_match(run),
    }


def _in_changes(run: RunData, wall: float | None) -> str:
    seconds = sum(row["seconds"] or 0.0 for row in run.changes)
    share = f" ({seconds / wall:.1%})" if wall and seconds else ""
    return f"{seconds:.3g} s{share}" if run.changes else "–"


def _to_match(run: RunData) -> str:
    match = run.summary.get("match_params")
    return "–" if match is None else f"{match['parameters']:,} ({match['asked']})"
