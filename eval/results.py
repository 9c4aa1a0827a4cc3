"""From predictions to accuracies: results.json and the table."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from eval.items import TaskItems
from eval.predictions import Prediction
from eval.protocols import Protocol
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.terminal.plain_text import markdown_text


@dataclass(frozen=True)
class TaskResult:
    """A task's counts. `unanswered` items count as wrong; `too_long` of them exceeded the model's context.

    `accuracy_per_token`: that of the log-likelihood per token; None where answers have the same number of tokens.
    """

    task: str
    correct: int
    total: int
    unanswered: int
    too_long: int
    chance: float
    accuracy_per_token: float | None

    @property
    def accuracy(self) -> float:
        """Correct items as a fraction of all."""
        return self.correct / self.total

    def to_json(self) -> dict[str, Any]:
        """The task's object in results.json."""
        line: dict[str, Any] = {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "total": self.total,
            "unanswered": self.unanswered,
            "chance": self.chance,
        }
        if self.too_long:
            line["too_long"] = self.too_long
        if self.accuracy_per_token is not None:
            line["accuracy_per_token"] = self.accuracy_per_token
        return line


def count(task: TaskItems, predictions: Sequence[Prediction]) -> TaskResult:
    """Count one task's predictions, one per item."""
    per_token = [p.per_token == p.answer for p in predictions if p.per_token is not None]
    return TaskResult(
        task=task.task,
        correct=sum(p.correct for p in predictions),
        total=len(predictions),
        unanswered=sum(p.prediction is None for p in predictions),
        too_long=sum(p.note is not None for p in predictions),
        chance=task.chance,
        accuracy_per_token=sum(per_token) / len(predictions) if per_token else None,
    )


def mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def summarise(
    results: Sequence[TaskResult], protocol: Protocol, settings: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The object of results.json; accuracies are fractions, `average` is unweighted over the tasks."""
    return {
        "model": settings["model"],
        "adapter": settings["adapter"],
        "mode": protocol.name,
        "protocol": protocol.label,
        "tasks": {result.task: result.to_json() for result in results},
        "average": mean([result.accuracy for result in results]),
        "chance": mean([result.chance for result in results]),
        "settings": dict(settings),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of everything that results may depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "flexlora-ds"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(summary: Mapping[str, Any], protocol: Protocol) -> str:
    """The table of results.json as Markdown that reads well in a terminal."""
    settings, tasks = summary["settings"], summary["tasks"]
    rows = [
        (
            name,
            f"{100 * t['accuracy']:.2f}",
            f"{100 * t['chance']:.1f}",
            str(t["unanswered"]),
            f"{t['total']:,}",
        )
        for name, t in tasks.items()
    ]
    total, unanswered = (sum(t[key] for t in tasks.values()) for key in ("total", "unanswered"))
    average = (
        f"{100 * summary['average']:.2f}",
        f"{100 * summary['chance']:.1f}",
        str(unanswered),
        f"{total:,}",
    )
    rows.append(("**average**", *average))
    subject = summary["model"] + (f" + {summary['adapter']}" if summary["adapter"] else "")
    limited = f", first {settings['limit']} items of each task" if settings["limit"] else ""
    head = f"**{markdown_text(subject)}**\n\nProtocol `{protocol.label}`: {protocol.summary}. "
    head += f"Prompt `{settings['prompt']}`, {settings['dtype']}{limited}.\n"
    return head + "\n" + markdown_table(("task", "accuracy %", "chance %", "unanswered", "items"), rows)
