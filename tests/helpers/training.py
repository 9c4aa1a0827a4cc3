"""A tiny base, a few dozen records and the training command: what the tests of whole runs share."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.tasks import TASKS
from tests.helpers import eval_tiny
from tests.helpers.processes import ROOT, ScriptResult, run_script

STEPS = 16
CHANGES = [5, 8, 11]
"""The steps after which ranks change under `SMALL`."""

SMALL: dict[str, Any] = {
    "rank": 4,
    "dropout": 0.2,
    "adjust_size": 3,
    "adjust_start": 2,
    "adjust_freeze": 4,
    "adjust_interval": 3,
    "schedule": "constant",
    "max_steps": STEPS,
    "batch_size": 8,
    "lr": 5e-3,
    "warmup_steps": 3,
    "val_size": 5,
    "log_every": 1,
    "cutoff_len": 200,
    "dtype": "fp32",
    "init": "gaussian",
}
"""Options of a run of some seconds with three rank changes and dropout.

Not the start from the gradient, which has tests of its own: it takes sixteen batches before the first step.
"""


@dataclass(frozen=True)
class Place:
    """A folder with a base model of two layers and its tokenizer (`model/`) and records of unequal length."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "records.json"

    def arguments(self, out: Path | str, stage: int = 2, **options: Any) -> list[str]:
        """The words after `launch/train.py`; `options` override `SMALL`, None leaves a key out."""
        given = {
            "ds": f"ds_configs/zero{stage}.json",
            "model": self.model,
            "data": self.data,
            "out": out,
            **SMALL,
            **options,
        }
        return [f"--{key}={_word(value)}" for key, value in given.items() if value is not None]

    def train(self, out: Path, world_size: int = 1, stage: int = 2, **options: Any) -> list[ScriptResult]:
        """Run the command in real processes; it must succeed."""
        results = run_script(
            ["launch/train.py", *self.arguments(out, stage, **options)], world_size, timeout=300
        )
        for result in results:
            assert result.returncode == 0, result.stderr
        return results


def require_fp16() -> None:
    """Skip the test, visibly, where DeepSpeed computes no fp16 (most CPUs)."""
    import pytest  # here: whole runs are made where there is none, too
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed computes no fp16 on this device")


def make_place(root: Path, records: int = 40, seed: int = 3) -> Place:
    """Write the base model, its tokenizer and the records."""
    place = Place(root)
    eval_tiny.make_model(seed=4).save_pretrained(place.model)
    eval_tiny.make_tokenizer().save_pretrained(place.model)
    rng = random.Random(seed)
    tasks = sorted(TASKS)
    corpus = [eval_tiny.make_record(rng.choice(tasks), rng) for _ in range(records)]
    place.data.write_text(json.dumps(corpus, indent=1))
    return place


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; every line strict JSON."""
    return [json.loads(line, parse_constant=_no_constant) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [row["loss"] for row in read_lines(run / "metrics.jsonl")]


def ranks(run: Path) -> list[dict[str, int]]:
    """The ranks after each change of a run."""
    return [row["ranks"] for row in read_lines(run / "ranks.jsonl")]


def relative(values: list[float], others: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))


def command(arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Call the training command's `main` in a test process that stays: its exit code and what it printed.

    Runs inside the processes of `tests.helpers.processes`; spares every case the start of a Python with torch.
    """
    from unittest.mock import patch

    os.chdir(ROOT)
    with patch.dict(os.environ, environment or {}), _captured() as texts:
        from launch.train import main

        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except Exception:  # as Python does with what nobody catches
            code = 1
            traceback.print_exc()
    return {"code": code, "stdout": texts[0], "stderr": texts[1]}


@contextmanager
def _captured() -> Iterator[list[str]]:
    """What is written to the descriptors 1 and 2 meanwhile, by Python or by libraries below it."""
    texts: list[str] = []
    with ExitStack() as stack:
        files = {fd: stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for fd in (1, 2)}
        sys.stdout.flush()
        sys.stderr.flush()
        kept = {fd: os.dup(fd) for fd in files}
        for fd, file in files.items():
            os.dup2(file.fileno(), fd)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, file in files.items():
                os.dup2(kept[fd], fd)
                os.close(kept[fd])
                file.seek(0)
                texts.append(file.read())


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
