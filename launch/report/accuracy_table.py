"""The accuracies that were measured while a model was trained, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.report.numbers import number


def accuracy_rows(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each measurement (accuracy.jsonl), the tasks in the order in which they first appear."""
    tasks = list(dict.fromkeys(task for row in measured for task in row["accuracy"]))
    return [
        {
            "step": f"{row['step']:,}",
            **{task: number(row["accuracy"].get(task), ".1%") for task in tasks},
            "average": number(row["average"], ".1%"),
            "items": f"{row['items']:,}",
            "protocol": row["protocol"],
        }
        for row in measured
    ]
