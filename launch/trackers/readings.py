"""The rows of a run's logs as numbers with names, the same in every tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]

HEATMAP = "ranks"
"""The name of the picture of all ranks over all changes."""

_OF_STEPS = {
    "loss": "train/loss",
    "orth": "train/orth",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens": "train/tokens",
    "skipped": "train/skipped",
    "total_rank": "train/total_rank",
    "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s",
    "peak_mem_gb": "memory/peak_gb",
}
_OF_CHANGES = {"trainable_params": "change/trainable_params", "score_margin": "change/score_margin"}


def scalars_of(log: str, row: Row, importance: str) -> dict[str, float]:
    """What a row says, by name; numbers that were not finite are left out.

    Args:
        log: the name of the file that the row stands in.
        importance: the option of that name, which is what a matrix's score is called.
    """
    readers = {
        "metrics.jsonl": _of(row, _OF_STEPS),
        "validation.jsonl": _of(row, {"loss": "validation/loss"}),
        "ranks.jsonl": _of_change(row, importance),
        "accuracy.jsonl": _of_accuracy(row),
    }
    return {name: float(value) for name, value in readers[log] if value is not None}


def _of(row: Row, names: Mapping[str, str]) -> Iterator[tuple[str, float | None]]:
    return ((name, row[key]) for key, name in names.items() if key in row)


def _of_accuracy(row: Row) -> Iterator[tuple[str, float | None]]:
    yield "accuracy/average", row["average"]
    for task, share in row["accuracy"].items():
        yield f"accuracy/{task}", share


def _of_change(row: Row, importance: str) -> Iterator[tuple[str, float | None]]:
    yield from _of(row, _OF_CHANGES)
    yield "change/pruned", len(row["pruned"])
    yield "change/expanded", len(row["expanded"])
    for matrix, rank in row["ranks"].items():
        yield f"rank/{matrix}", rank
    for matrix, score in row["importance"].items():
        yield f"{importance}/{matrix}", score
