"""What both demos evaluate: the base and the adapter by one protocol, and the adapter's written answers beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BEFORE, AFTER, AFTER_GENERATE = "eval_before", "eval_after", "eval_after_generate"
"""The folders in the run folder. The first two are by `score`: every answer counts, so the base has a figure too."""


def evaluation_before(evaluate: Sequence[str], out: Path) -> tuple[str, list[str]]:
    """Title and command of the base's evaluation; `evaluate` is `-m eval` with model, data and tasks."""
    return "evaluation before", [*evaluate, "--mode", "score", "--out", str(out / BEFORE)]


def evaluations_after(evaluate: Sequence[str], out: Path) -> Iterator[tuple[str, list[str]]]:
    """Titles and commands of the adapter's two evaluations and of the comparison."""
    tuned = [*evaluate, "--adapter", str(out / "adapter")]
    yield "evaluation after", [*tuned, "--mode", "score", "--out", str(out / AFTER)]
    yield (
        "evaluation after, generated answers",
        [*tuned, "--mode", "generate", "--out", str(out / AFTER_GENERATE)],
    )
    settings = [f"before={out / BEFORE}", f"after={out / AFTER}"]
    beside = ["--beside", f"generate={out / AFTER_GENERATE}"]
    yield "comparison", ["-m", "eval.compare", *settings, *beside, "--out", str(out)]


def print_conclusion(out: Path) -> None:
    """Print in one sentence what was shown, and where to look next."""
    print(f"\n{conclusion(*(_results(out / folder) for folder in (BEFORE, AFTER, AFTER_GENERATE)))}")
    print(f"report  {out}/report/index.html")
    print(f"adapter {out}/adapter")
    print(f"tables  {out}/comparison.md")


def conclusion(before: dict[str, Any], after: dict[str, Any], generated: dict[str, Any]) -> str:
    """One sentence from the three results.json: accuracies averaged over the tasks, in %."""
    questions = sum(task["total"] for task in after["tasks"].values())
    verb = "raised" if after["average"] > before["average"] else "did not raise"
    return (
        f"Shown: training {verb} the accuracy on {questions:,} test questions from {_percent(before['average'])} "
        f"to {_percent(after['average'])} (score, chance {_percent(after['chance'])}), and the answers that the tuned "
        f"model writes are right in {_percent(generated['average'])} (generate)."
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results
