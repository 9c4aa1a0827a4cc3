"""What a finished run came to, in numbers read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flexlora_ds.checkpoint.adapter import masters_of
from flexlora_ds.checkpoint.files import checkpoints_in
from flexlora_ds.checkpoint.state import open_checkpoint
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.importance import exact_spectrum, score_matrices, spectrum_error
from launch.options.train_options import TrainOptions

EARLY = 40
"""Steps whose mean loss is the early loss."""
AFTERMATH = 20
"""Steps after a growth whose mean loss is looked at."""
QUARTERS = tuple(f"loss {k}/4" for k in (1, 2, 3, 4))


def figures(folder: Path) -> dict[str, float]:
    """Losses, sizes and spectra of a run, by name; what a run does not have is left out."""
    options = TrainOptions.from_yaml((folder / "options.yaml").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "lr": float(options.lr),
        "mean parameters": float(summary["trainable_params"]["mean"]),
        **training(folder),
        **validation(folder),
        **growth(folder),
        **spectra(folder),
    }


def training(folder: Path) -> dict[str, float]:
    """Mean loss of the early steps, and of the quarters of the run."""
    losses = losses_of(folder)
    early = [loss for step, loss in losses.items() if step <= EARLY]
    parts = np.array_split(list(losses.values()), len(QUARTERS))
    return {"early": float(np.mean(early))} | {
        name: float(np.mean(part)) for name, part in zip(QUARTERS, parts, strict=True)
    }


def validation(folder: Path) -> dict[str, float]:
    """The last validation loss, and the one nearest to the middle of the run."""
    losses = {row["step"]: float(row["loss"]) for row in lines_of(folder / "validation.jsonl")}
    last = max(losses)
    between = [step for step in losses if 0 < step < last]
    middle = {"val, middle": losses[min(between, key=lambda s: abs(2 * s - last))]} if between else {}
    return {**middle, "val, end": losses[last]}


def growth(folder: Path) -> dict[str, float]:
    """The steps of the first and the last expansion, and the mean loss of the steps after each; {} without one."""
    changes = lines_of(folder / "ranks.jsonl")
    steps = [row["step"] for row in changes if row["expanded"]]
    if not steps or any(row["pruned"] for row in changes):  # ranks that move are no growth
        return {}
    losses = losses_of(folder)

    def after(step: int) -> float:
        return float(np.mean([loss for s, loss in losses.items() if step < s <= step + AFTERMATH]))

    first, last = min(steps), max(steps)
    return {
        "grown from": first,
        "grown to": last,
        "loss after first": after(first),
        "loss after last": after(last),
        **worth(folder),
    }


def worth(folder: Path) -> dict[str, float]:
    """The rise of the validation loss without all directions born in the run, and its sum change by change.

    {} for a run that did not weigh them.
    """
    path = folder / "directions.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("loss") is None:
        return {}
    rises = [row["rise"] for row in found["changes"]]
    return {"worth together": float(found["together"]["rise"]), "worth one by one": float(sum(rises))}


def spectra(folder: Path) -> dict[str, float]:
    """How far λ are from singular values at the end of a run; nothing for LoRA."""
    checkpoint = open_checkpoint(checkpoints_in(folder / "checkpoints")[-1])
    if not checkpoint.ranks:
        return {}
    by_lambda, exact, violations = {}, {}, []
    for name, matrix in masters_of(checkpoint).items():
        grams = [(m.T @ m).double() for m in (matrix.P, matrix.Q.T)]
        violations += [float((gram - gram.new_ones(len(gram)).diag()).norm()) for gram in grams]
        by_lambda[name], exact[name] = matrix.lam, exact_spectrum(*grams, matrix.lam)
    scores = [list(score_matrices(s, FlexLoRAConfig()).values()) for s in (by_lambda, exact)]
    ranks = [np.argsort(np.argsort(values)) for values in scores]
    return {
        "violation": float(np.mean(violations)),
        "spectrum error": float(np.mean([spectrum_error(by_lambda[n], exact[n]) for n in exact])),
        "entropies' rank correlation": float(np.corrcoef(*ranks)[0, 1]),
    }


def losses_of(folder: Path) -> dict[int, float]:
    """The training loss of every step."""
    return {row["step"]: float(row["loss"]) for row in lines_of(folder / "metrics.jsonl")}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
