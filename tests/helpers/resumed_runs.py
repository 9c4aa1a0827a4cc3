"""Runs that are interrupted or not, in processes that stay, and whether one is the other to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place

SAVE_EVERY = 7  # of 16 steps: after the first of three rank changes, between two validations
Runs = dict[tuple[str, int, str], Path]
"""Run folders by (ds_config, processes, method)."""


def run_training(processes: Processes, arguments: list[str]) -> str:
    """Run the command in processes that stay; what it said."""
    results = processes.run(training.command, arguments, timeout=600)
    for result in results:
        assert result["code"] == 0, result["stderr"]
    return str(results[0]["stderr"])


def uninterrupted_run(
    runs: Runs, place: Place, folder: Path, processes: Processes, ds: str, method: str = "flexlora"
) -> Path:
    """The run that nothing disturbs, made once."""
    key = (ds, processes.world_size, method)
    if key not in runs:
        out = folder / "-".join(map(str, key))
        run_training(processes, saving_arguments(place, out, ds, method=method))
        runs[key] = out
    return runs[key]


def saving_arguments(place: Place, out: Path, ds: str, **options: Any) -> list[str]:
    """The words of a run that accumulates, validates and saves on the way."""
    accumulation = {"micro_batch_size": 2, "save_every": SAVE_EVERY, "keep_checkpoints": 9, "val_every": 4}
    return place.arguments(out, ds=f"ds_configs/{ds}.json", **{**accumulation, **options})


def final_state(out: Path, last: int = training.STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by label."""
    tensors = {}
    for path in sorted((out / "checkpoints" / f"step_{last:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def untimed_rows(out: Path, name: str) -> list[dict[str, Any]]:
    """A log without what is measured in seconds or bytes; nothing where the method writes none."""
    if not (out / name).exists():
        return []
    timed = ("seconds", "tokens_per_s", "step_s", "peak_mem_gb")
    return [{k: v for k, v in row.items() if k not in timed} for row in training.read_lines(out / name)]


def assert_same_run(out: Path, reference: Path, last: int = training.STEPS) -> None:
    """Losses, gradient norms, ranks, validations, and every tensor at the end, bit for bit."""
    for name in ("metrics.jsonl", "ranks.jsonl", "validation.jsonl"):
        assert untimed_rows(out, name) == untimed_rows(reference, name), name
    mine, theirs = final_state(out, last), final_state(reference, last)
    assert mine.keys() == theirs.keys() and mine
    for label in theirs:
        assert torch.equal(mine[label], theirs[label]), label
