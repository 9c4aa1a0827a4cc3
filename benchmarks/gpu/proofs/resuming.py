"""A run of the training command, and one that continues from its checkpoint: the same numbers, bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.proofs import worker
from benchmarks.gpu.proofs.proof import Verdict
from benchmarks.gpu.proofs.teams import Teams
from benchmarks.gpu.section import Conditions

TIMED = ("seconds", "tokens_per_s", "step_s", "peak_mem_gb")


def resumed(conditions: Conditions, teams: Teams) -> Verdict:
    """16 steps with three rank changes and dropout, continued after step 7; deterministic algorithms on."""
    from tests.helpers import training

    with tempfile.TemporaryDirectory(prefix="flexlora-") as folder:
        place = training.make_place(Path(folder))
        options = {"micro_batch_size": 4, "save_every": 7, "keep_checkpoints": 9, "val_every": 4}
        whole, again = Path(folder) / "whole", Path(folder) / "resumed"
        odd_kernels = _train(teams, place.arguments(whole, **options))
        checkpoint = whole / "checkpoints" / "step_00000007"
        _train(teams, place.arguments(again, resume=checkpoint, **options))
        apart = [log for log in ("metrics", "ranks", "validation") if _rows(whole, log) != _rows(again, log)]
        mine, theirs = _state(again), _state(whole)
        apart += [
            label for label in theirs if label not in mine or not torch.equal(mine[label], theirs[label])
        ]
        changes = len(_rows(whole, "ranks"))
    detail = f"{len(theirs)} tensors and the logs of 16 steps, {changes} changes"
    detail += f"; apart: {', '.join(apart[:5])}" if apart else ""
    detail += f"; without determinism of: {odd_kernels}" if odd_kernels else ""
    return not apart and len(theirs) > 0 and changes == 3, detail


def _train(teams: Teams, arguments: list[str]) -> str:
    """Run the command; where a kernel has no deterministic form, which one, and the run goes on with a warning."""
    (result,) = teams["programs"].run(worker.train_deterministically, arguments)
    if result["code"] == 0:
        return ""
    found = [line for line in str(result["stderr"]).splitlines() if "deterministic" in line]
    if not found:
        raise RuntimeError(f"the command ended with {result['code']}: {result['stderr'][-600:]}")
    (out,) = (word.removeprefix("--out=") for word in arguments if word.startswith("--out="))
    shutil.rmtree(out, ignore_errors=True)
    (result,) = teams["programs"].run(worker.train_deterministically, arguments, True)
    if result["code"] != 0:
        raise RuntimeError(f"the command ended with {result['code']}: {result['stderr'][-600:]}")
    return found[0].strip()[:120]


def _rows(out: Path, log: str) -> list[dict[str, Any]]:
    from tests.helpers import training

    rows = training.read_lines(out / f"{log}.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def _state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by label."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted((out / "checkpoints" / "step_00000016").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors
